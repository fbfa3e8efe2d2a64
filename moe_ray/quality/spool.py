"""One model's predictions on disk while another is in memory."""

from __future__ import annotations

import shutil
import tempfile
from typing import Final, Literal, get_args

import numpy as np
import torch

from moe_ray.errors import ConfigError

SpoolDtype = Literal["float32", "float16"]
_FREE: Final = 0.9
"""The share of what is free on the disk that a spool may take."""


def spool_dtype(name: str) -> SpoolDtype:
    """The dtype of this name. Raises `ConfigError`."""
    for allowed in get_args(SpoolDtype):
        if name == allowed:
            return allowed
    raise ConfigError(f"--spool: {' or '.join(get_args(SpoolDtype))}, got {name!r}")


class Spool:
    """Logits in a temporary file, in the order in which they were put; gone when it is closed. Used by one thread."""

    def __init__(self, positions: int, vocabulary: int, dtype: SpoolDtype = "float32") -> None:
        """Make room for `positions` rows. Raises `ConfigError` where the disk has none."""
        self._dtype = np.dtype(dtype)
        self._vocabulary = vocabulary
        directory = tempfile.gettempdir()
        needed, free = positions * vocabulary * self._dtype.itemsize, shutil.disk_usage(directory).free
        if needed > _FREE * free:
            raise ConfigError(
                f"{positions:,} predictions of {vocabulary:,} tokens are {needed / 1e9:.1f} GB in {dtype}, and "
                f"{directory} has {free / 1e9:.1f} GB free: lower --limit-tokens, or --spool float16, or set TMPDIR"
            )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`

    def put(self, logits: torch.Tensor) -> None:
        """Keep logits [T, V]; as float16 less the largest of each row, so that likely tokens are kept most exactly."""
        rows = logits.numpy()
        if self._dtype == np.float16:
            rows = rows - rows.max(axis=-1, keepdims=True)
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def rewind(self) -> None:
        """Begin to read."""
        self._file.seek(0)

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows, float32 [count, V]."""
        rows = np.empty((count, self._vocabulary), self._dtype)
        got = self._file.readinto(rows.data.cast("B"))  # type: ignore[attr-defined]
        assert got == rows.nbytes, "read what was put"
        return torch.from_numpy(rows.astype(np.float32, copy=False))

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
