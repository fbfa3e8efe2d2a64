"""Reads the weights of a checkpoint, safetensors or GGUF, so that every process reads only its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.families import Layout, Weight
from moe_ray.model.formats import (
    ALTERNATING,
    FLOATS,
    FORMATS,
    BadTensor,
    GroupedCodes,
    Place,
    Source,
    StoredWeight,
    TensorEntry,
    TensorPart,
)
from moe_ray.model.matrix import StoredMatrix, tensor_of
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.row_order import codes_in_halves, pairs_in_halves, rotary_pairs
from moe_ray.model.safetensors_file import DTYPES, numpy_dtype
from moe_ray.model.tensor_file import aligned, read_bytes
from moe_ray.model.weight_files import Header, find_weights, header_of, index_of
from moe_ray.model.weights import head_weight, weights_of_expert, weights_of_trunk

if TYPE_CHECKING:
    import numpy as np
    import torch

ALTERNATE: Final = "experts whose gate and up alternate"
SAMPLED_ROWS: Final = 8
"""Of each matrix, for its fingerprint."""
OTHER_SUFFIXES: Final = {
    "weight._data": "quanto",
    "codes": "AQLM",
    "Qidxs": "QuIP#",
    "weight_scale_2": "NVFP4",
    "trellis": "EXL3",
    "q_weight": "EXL2",
}
"""A tensor of this name where a weight is missing → whose it is."""

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read) of one process."""


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint directory. Not thread-safe. `bytes_read` counts what `read` has taken from it."""

    directory: Path
    config: ModelConfig
    layout: Layout
    """How its tensors are named."""
    files: dict[str, str]
    """Tensor name → file name."""
    bytes_read: int = 0
    _headers: dict[str, Header] = field(default_factory=dict)
    """File name → its header, of the files that were needed."""
    _opened_files: dict[str, BinaryIO] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Open `directory`, reading config.json and the index only. Raises `CheckpointError`."""
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: not a directory")
        config = ModelConfig.load(directory)
        files, headers = find_weights(directory)
        return Checkpoint(directory, config, _layout_of(config, files), files, _headers=headers)

    def check(self, weights: Iterable[Weight]) -> int:
        """Check that every weight exists with its shape, in a known format; return their bytes on disk.

        Reads as `find` does. Raises `CheckpointError` naming file and tensor.
        """
        return sum(self.find(weight).nbytes for weight in weights)

    def find(self, weight: Weight) -> StoredWeight:
        """Where and in which format one weight is stored. Raises `CheckpointError`.

        Reads headers, and of some formats small tensors that say how the others are stored.
        """
        if weight.role == "embed" and self.config.tie_word_embeddings and not self.holds(weight):
            weight = head_weight(self.config)  # a tied pair may be stored under either name
        place = self.place(weight)
        source = Source(self._entry, self.tensor, self.config.quantization)
        with self._named():
            for row in FORMATS.values():
                if (stored := row.find(place, weight.shape, source)) is not None:
                    if (place.alternate or place.transposed) and row.name not in ALTERNATING:
                        raise BadTensor(stored.parts[0].name, f"{row.name} weights of {ALTERNATE} are not read")
                    return replace(stored, pairs=rotary_pairs(self.config, self.layout, weight))
        raise self._not_found(place)

    def matrix(self, weight: Weight, read: Callable[[], None] = lambda: None) -> StoredMatrix:
        """One weight [N, K] to be read later; `read` is called after each reading. Raises `CheckpointError`."""

        stored = self.find(weight)

        def values() -> np.ndarray:
            found = self._take(stored)
            read()
            return found

        def codes() -> GroupedCodes:
            with self._named():
                found = FORMATS[stored.format].codes(stored, self.arrays(stored))
            assert found is not None, "a matrix without a grouping has no codes"
            self.bytes_read += stored.nbytes
            read()
            return found if stored.pairs is None else codes_in_halves(found, stored.pairs)

        return StoredMatrix(stored, values, codes)

    def read(self, weight: Weight, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return one weight in memory of its own (never a view of the file). Raises `CheckpointError`."""
        return tensor_of(self.read_values(weight)).to(device=device, dtype=dtype)

    def read_values(self, weight: Weight) -> np.ndarray:
        """Return one weight's values, in the float dtype that its format decodes to. Raises `CheckpointError`."""
        return self._take(self.find(weight))

    def arrays(self, stored: StoredWeight) -> list[np.ndarray]:
        """The arrays of a weight as they are stored, in memory of their own; not counted as read.

        Raises `CheckpointError`.
        """
        return [self._bytes(part).view(numpy_dtype(part.dtype)).reshape(part.shape) for part in stored.parts]

    def tensor(self, name: str) -> np.ndarray:
        """All of a tensor that there is, whatever it is. Not counted as read. Raises `CheckpointError`."""
        entry = self._entry(name)
        assert entry is not None
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{self._where(name)}: dtype {entry.dtype}, supported: {', '.join(DTYPES)}")
        part = TensorPart.whole(name, entry)
        return self._bytes(part).view(numpy_dtype(part.dtype)).reshape(part.shape)

    def fingerprint(self, weights: Iterable[Weight]) -> bytes:
        """A digest of weights by their format, shape and `SAMPLED_ROWS` rows of each, spread from first to last.

        Equal for copies of one checkpoint wherever and in which layout they lie; another training's differ in it.
        Reads those rows only, which `bytes_read` does not count. Raises `CheckpointError`.
        """
        digest = hashlib.blake2b(digest_size=16)
        for weight in weights:
            stored = self.find(weight)
            digest.update(f"{stored.format} {stored.shape}".encode())
            for part in stored.parts:
                rows = part.shape[0] if part.shape else 1
                for row in sorted({(rows - 1) * i // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)}):
                    digest.update(self._bytes(part.rows(row, 1) if part.shape else part).data)
        return digest.digest()

    def equal(self, one: Weight, other: Weight) -> bool:
        """Whether two weights of one shape have the same values. Not counted as read. Raises `CheckpointError`."""
        import numpy as np

        return np.array_equal(self._values(self.find(one)), self._values(self.find(other)))

    def place(self, weight: Weight) -> Place:
        """Where the checkpoint's layout keeps a weight, whether it is there or not."""
        return self.layout.place(weight, self.config.num_local_experts)

    def start_of(self, part: TensorPart) -> int:
        """Where in its file the bytes of a part begin. Raises `CheckpointError`."""
        entry = self._entry(part.name)
        assert entry is not None
        return entry.start + part.offset

    def holds(self, weight: Weight) -> bool:
        """Whether some format's tensors of this weight are there, by their names."""
        return any(row.names(self.place(weight))[0] in self.files for row in FORMATS.values())

    def close(self) -> None:
        """Close the files, and forget their headers. What is wanted later opens them again."""
        for file in self._opened_files.values():
            file.close()
        self._opened_files.clear()
        self._headers.clear()

    def _take(self, stored: StoredWeight) -> np.ndarray:
        """One weight's values, counted in `bytes_read`."""
        values = self._values(stored)
        self.bytes_read += stored.nbytes
        return values

    def _values(self, stored: StoredWeight) -> np.ndarray:
        """One weight's values, in the float dtype that its format decodes to."""
        with self._named():
            values = FORMATS[stored.format].decode(stored, self.arrays(stored))
        return values if stored.pairs is None else pairs_in_halves(values, stored.pairs)

    def _bytes(self, part: TensorPart) -> np.ndarray:
        """The bytes of a part of a tensor, aligned memory of its own."""
        array = aligned(part.span)
        entry = self._entry(part.name)
        assert entry is not None
        try:
            missing = read_bytes(self._opened(self.files[part.name]), entry.start + part.offset, array.data)
        except OSError as error:
            raise CheckpointError(f"{self._where(part.name)}: cannot be read ({error})") from None
        if missing:
            raise CheckpointError(f"{self._where(part.name)}: the file ended {missing} bytes early")
        return array if part.alternation is None else part.alternation.of(array, aligned(part.nbytes))

    def _opened(self, file: str) -> BinaryIO:
        if file not in self._opened_files:
            self._opened_files[file] = open(self.directory / file, "rb", buffering=0)  # noqa: SIM115 - until `close`
        return self._opened_files[file]

    def _entry(self, name: str) -> TensorEntry | None:
        """The header of one tensor; None: there is none of this name. Raises `CheckpointError` on a damaged file."""
        if name not in self.files:
            return None
        file = self.files[name]
        if file not in self._headers:
            if not (self.directory / file).is_file():
                raise CheckpointError(f"{self._where(name)}: named in {index_of(self.directory)}, the file is missing")
            self._headers[file] = header_of(self.directory / file, f": tensor {name}")
        if name not in self._headers[file]:
            raise CheckpointError(f"{self._where(name)}: named in {index_of(self.directory)} but not in the file")
        return self._headers[file][name]

    def _not_found(self, place: Place) -> CheckpointError:
        name = place.named("weight")
        entry = self._entry(name)
        if entry is not None:
            supported = ", ".join(stored for stored, (dtype, _) in DTYPES.items() if dtype in FLOATS)
            return CheckpointError(
                f"{self._where(name)}: dtype {entry.dtype}, supported: {supported}, and the quantised formats "
                f"{', '.join(name for name in FORMATS if name not in FLOATS)}"
            )
        for suffix, whose in OTHER_SUFFIXES.items():
            if place.named(suffix) in self.files:
                return CheckpointError(
                    f"{self._where(place.named(suffix))}: {whose} weights are not read; read are floats and "
                    f"{', '.join(name for name in FORMATS if name not in FLOATS)}"
                )
        return CheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raises a format's `BadTensor` as `CheckpointError`, with the file of the tensor."""
        try:
            yield
        except BadTensor as error:
            raise CheckpointError(f"{self._where(error.name)}: {error}") from None

    def _where(self, name: str) -> str:
        return f"{self.directory / self.files[name]}: tensor {name}"


def _layout_of(config: ModelConfig, files: Collection[str]) -> Layout:
    """The layout of the family that names most of these tensors; the first one where they tell nothing."""
    first = config.mixture_layers[0]
    first_layer = [weight for weight in weights_of_trunk(config) if weight.layer in (None, 0, first)]
    for expert in range(config.num_local_experts):
        first_layer += weights_of_expert(config, first, expert)

    def named(layout: Layout) -> int:
        places = [layout.place(weight, config.num_local_experts) for weight in first_layer]
        return sum(any(name in files for row in FORMATS.values() for name in row.names(place)) for place in places)

    return max(config.family.layouts, key=named)
