"""Writes one safetensors file tensor by tensor: none stays in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch

from moe_ray.errors import CheckpointError
from moe_ray.model.safetensors_file import DTYPES

HEADER_BYTES: Final = 1 << 16
"""Room for the header, which is known last but stands first; the format fills it up with spaces."""
_LENGTH_BYTES: Final = 8
_NAMES: Final = {numpy_name: name for name, (numpy_name, _) in DTYPES.items()}


class ShardFile:
    """A file that is being written. `close` completes it."""

    def __init__(self, path: Path) -> None:
        """Create it. Raises `OSError`."""
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 - until `close`
        self._file.seek(HEADER_BYTES)
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = _LENGTH_BYTES + len(json.dumps(self._header))
        self.data_bytes = 0

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for one more tensor, and what is written ends where that may begin.

        Readers map elements in place, and the format has no gaps.
        """
        more = len(json.dumps({name: self._entry(tensor)})) + len(", ")
        return self._header_bytes + more <= HEADER_BYTES and self.data_bytes % tensor.itemsize == 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, on a CPU. Raises `CheckpointError` where it cannot be written."""
        entry = self._entry(tensor)
        try:
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error}") from error
        self._header[name] = entry
        self._header_bytes += len(json.dumps({name: entry})) + len(", ")
        self.data_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the header. Raises `CheckpointError` where it cannot be written."""
        text = json.dumps(self._header).encode().ljust(HEADER_BYTES - _LENGTH_BYTES)
        try:
            with self._file as file:
                file.seek(0)
                file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error}") from error

    def abandon(self) -> None:
        """Leave it as it is, of no use. Idempotent."""
        self._file.close()

    def _entry(self, tensor: torch.Tensor) -> dict[str, object]:
        return {
            "dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, self.data_bytes + tensor.nbytes],
        }
