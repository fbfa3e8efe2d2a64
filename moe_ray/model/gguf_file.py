"""The header of a GGUF file: its metadata, and where its tensors lie.

The format (github.com/ggml-org/ggml, docs/gguf.md), little-endian, strings with a length of 8 bytes in front:
["GGUF"][version, 4][tensors, 8][pairs, 8][pair: key, kind of value 4, value]…
[tensor: name, dimensions 4, sizes 8 each with the inner one first, type 4, offset 8]…[padding][the tensors' bytes].
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.formats import TensorEntry
from moe_ray.model.tensor_file import NotWhole

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
"""Version 1 (August 2023) has counts of 4 bytes, and no model that is still about."""
MAX_DIMENSIONS: Final = 4
DEFAULT_ALIGNMENT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_STRING, _ARRAY = 8, 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of value → struct's letter."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """How ggml stores a run of a row's elements."""

    name: str
    elements: int
    nbytes: int


TYPES: Final[dict[int, BlockType]] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
"""ggml's number of a type (ggml.h) → the type; floats and integers have safetensors' names. Not all are computed."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its tensors' bytes."""

    metadata: Mapping[str, Value]
    tensors: dict[str, TensorEntry]


def read_gguf(path: Path) -> GgufHeader:
    """The header, checked against the file's size.

    Raises `NotWhole`, `OSError`, and `CheckpointError` for a file of a kind or with a type that is not known.
    """
    with open(path, "rb") as file:
        return _Reading(file, os.fstat(file.fileno()).st_size).header()


def read_gguf_tensors(path: Path) -> dict[str, TensorEntry]:
    """Tensor name → what the header says of it. Raises as `read_gguf` does."""
    return read_gguf(path).tensors


@dataclass(slots=True)
class _Reading:
    file: BinaryIO
    size: int
    """Of the file, in bytes: nothing in it is longer."""

    def header(self) -> GgufHeader:
        if self._bytes(4) != MAGIC:
            raise NotWhole("its first bytes are not GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            supported = " and ".join(map(str, VERSIONS))
            raise CheckpointError(f"{self.file.name}: GGUF, {what}; supported: little-endian, versions {supported}")
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(self._bounded(num_pairs)):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        found = [self._tensor() for _ in range(self._bounded(num_tensors))]
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise NotWhole(f"{ALIGNMENT_KEY} is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {
            name: TensorEntry(kind.name, shape, start + offset, self._nbytes(name, kind, shape))
            for name, kind, shape, offset in found
        }
        end = max((entry.start + entry.nbytes for entry in tensors.values()), default=start)
        if tensors and end > self.size:
            raise NotWhole(f"{self.size} bytes, its header says {end}")
        return GgufHeader(metadata, tensors)

    def _tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise NotWhole(f"tensor {name} of {dimensions} dimensions")
        sizes = [self._number("Q") for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in TYPES:
            raise CheckpointError(f"{self.file.name}: tensor {name}: type {kind} of ggml is not known here")
        return name, TYPES[kind], tuple(reversed(sizes)), offset

    @staticmethod
    def _nbytes(name: str, kind: BlockType, shape: tuple[int, ...]) -> int:
        if shape and shape[-1] % kind.elements:
            raise NotWhole(f"tensor {name}: rows of {shape[-1]} elements in {kind.name}'s blocks of {kind.elements}")
        return math.prod(shape) // kind.elements * kind.nbytes

    def _value(self, kind: int) -> Value:
        if kind == _ARRAY:
            inner, count = self._number("I"), self._bounded(self._number("Q"))
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            if inner not in _SCALARS:
                raise NotWhole(f"an array of values of kind {inner}")
            letter = _SCALARS[inner]
            numbers = self._bytes(count * struct.calcsize(f"<{letter}"))
            return list(struct.unpack(f"<{count}{letter}", numbers))
        return self._scalar(kind)

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise NotWhole(f"a value of kind {kind}")
        letter = _SCALARS[kind]
        value: Scalar = struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]
        return value

    def _number(self, letter: str) -> int:
        number: int = struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]
        return number

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _bytes(self, count: int) -> bytes:
        found = self.file.read(self._bounded(count))
        if len(found) < count:
            raise NotWhole(f"{self.size} bytes, its header is longer")
        return found

    def _bounded(self, count: int) -> int:
        """A count of things of at least a byte each, if the file can hold so many."""
        if count > self.size:
            raise NotWhole(f"{self.size} bytes, its header counts {count}")
        return count
