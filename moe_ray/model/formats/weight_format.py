"""What a weight format is: which tensors of a checkpoint hold one weight, their bytes, and how values come out of them.

A format knows neither families nor devices. It is told where a family keeps a weight (`Place`), says which bytes of
which tensors that is (`StoredWeight`), and turns them into values. A backend with kernels for a format takes the
arrays as they are stored; the reference takes what `decode` makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moe_ray.model.formats.grouped import Grouping
from moe_ray.model.formats.quantization import Quantization

if TYPE_CHECKING:
    import numpy as np

    from moe_ray.model.formats.grouped import GroupedCodes


@dataclass(frozen=True, slots=True)
class Place:
    """Where one weight is kept: in tensors of its own, or as one of the equal parts of a stacked tensor.

    A stacked tensor is [experts, parts * rows, columns]: expert e's part p is one run of rows or, where parts
    `alternate`, row p of each `parts` rows.
    """

    stem: str
    """The tensors' name without the format's suffix, e.g. "model.layers.0.self_attn.q_proj"."""
    experts: int | None = None
    """Of the stacked tensor; None: the weight has tensors of its own."""
    parts: int = 1
    index: int = 0
    """Which of the `experts * parts` parts the weight is."""
    bare: bool = False
    """Whether the stem is the tensor's whole name, as a bias's."""
    alternate: bool = False
    """Whether the rows of a stack's parts alternate."""
    transposed: bool = False
    """Whether a stack of floats is [experts, columns, parts * rows]; a quantised one is not."""

    def named(self, suffix: str) -> str:
        """The name of one of its tensors. A stacked tensor is a parameter of its own and has no ".weight"."""
        if self.experts is None and not self.bare:
            return f"{self.stem}.{suffix}"
        return self.stem if suffix == "weight" else f"{self.stem}_{suffix}"

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor that holds a part of this shape."""
        if self.experts is None:
            return shape
        return (self.experts, self.parts * shape[0], *shape[1:])

    def tensor_part(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> TensorPart:
        """The bytes of this place in one of its tensors, where they take `nbytes` as `shape`, row by row.

        In a transposed one it is the numbers of each row that alternate, not the rows.
        """
        if not self.alternate or self.parts == 1:
            return TensorPart(name, dtype, shape, nbytes, self.index * nbytes)
        expert, part = divmod(self.index, self.parts)
        run = nbytes // (math.prod(shape) if self.transposed else shape[0])
        return TensorPart(name, dtype, shape, nbytes, expert * self.parts * nbytes, Alternation(self.parts, part, run))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a file's header says of one tensor."""

    dtype: str
    """In safetensors' words: "F32", "BF16", "I8", …"""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Alternation:
    """Which runs of a stretch of bytes count: run number `part` of each `parts` runs of `nbytes` bytes."""

    parts: int
    part: int
    nbytes: int

    def of(self, stretch: np.ndarray, out: np.ndarray) -> np.ndarray:
        """`out`, filled with the runs of a stretch that count; uint8 both."""
        out.reshape(-1, self.nbytes)[:] = stretch.reshape(-1, self.parts, self.nbytes)[:, self.part]
        return out


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Bytes of one tensor, and what they are: consecutive ones, unless they alternate with those of other weights."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    """Bytes of the tensor that lie before them."""
    alternation: Alternation | None = None
    """None: they are consecutive."""

    @property
    def span(self) -> int:
        """Bytes of the tensor from `offset` on that hold them, those of others between them included."""
        return self.nbytes * (1 if self.alternation is None else self.alternation.parts)

    def rows(self, first: int, count: int) -> TensorPart:
        """The bytes of some of its rows."""
        each = self.span // self.shape[0]
        start, nbytes = self.offset + first * each, count * (self.nbytes // self.shape[0])
        return TensorPart(self.name, self.dtype, (count, *self.shape[1:]), nbytes, start, self.alternation)

    @staticmethod
    def whole(name: str, entry: TensorEntry) -> TensorPart:
        """All of a tensor."""
        return TensorPart(name, entry.dtype, entry.shape, entry.nbytes)


@dataclass(frozen=True, slots=True)
class RotaryPairs:
    """Rows of a weight that rotary embeddings turn two by two, where the two of a pair lie side by side."""

    heads: int
    rows: int
    """Of each head, its last ones; those before them are not turned."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight as a checkpoint holds it, whatever the format: its name in `FORMATS`, shape, and bytes."""

    format: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    grouping: Grouping | None = None
    """How it is quantised, where its format gives `codes`; None: it comes as floats only."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where a format's tensors alone do not tell."""
    pairs: RotaryPairs | None = None
    """Rotary pairs of rows that lie side by side in the file; None: rows lie in order."""
    transposed: bool = False
    """Whether its tensor has a row for each input."""

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Source:
    """What a checkpoint tells a format that looks for a weight."""

    entry: Callable[[str], TensorEntry | None]
    """What the headers say of a tensor; None: there is none of this name."""
    read: Callable[[str], np.ndarray]
    """A whole tensor. For the small ones that say how others are stored."""
    quantization: Quantization | None = None
    """What the checkpoint's configuration says. Which weights are quantised, their tensors say."""

    def require(self, name: str, owner: str, dtypes: tuple[str, ...]) -> TensorEntry:
        """The entry of a tensor that belongs to the tensor `owner`. Raises `BadTensor`."""
        entry = self.entry(name)
        if entry is None:
            raise BadTensor(owner, f"{name} is missing beside it")
        if entry.dtype not in dtypes:
            raise BadTensor(name, f"dtype {entry.dtype}, supported: {', '.join(dtypes)}")
        return entry


class WeightFormat(Protocol):
    """One way to store weights. Stateless; a row of `formats.FORMATS`."""

    @property
    def name(self) -> str:
        """In configuration, plans and messages."""
        ...

    def names(self, place: Place) -> tuple[str, ...]:
        """The tensors that may hold the weight of this place: the first one always, the others where they are there."""
        ...

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        """The weight of this place and shape, if it is stored in this format; else None.

        Raises `BadTensor` where it is, and its tensors are not what the format says.
        """
        ...

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The values of a weight from the arrays of its parts: float32, or float16 or bfloat16."""
        ...

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> GroupedCodes | None:
        """The same weight without a change of value, for kernels that compute on codes; None as `stored.grouping`."""
        ...


def sole_tensor(name: str, stored: str, whole: tuple[int, ...], source: Source) -> bool:
    """Whether a tensor of this dtype holds a weight alone; `whole`: its shape. Raises `ShapeMismatch`."""
    entry = source.entry(name)
    if entry is None or entry.dtype != stored:
        return False
    if _without_leading_ones(entry.shape) != _without_leading_ones(whole):
        raise ShapeMismatch(name, entry.shape, whole)
    return True


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same bytes: llama.cpp's converter has written a matrix of one row as a vector."""
    return _without_leading_ones(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


class BadTensor(Exception):
    """A tensor is not what its format says. Raised and caught inside `model/`."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(problem)
        self.name = name


class ShapeMismatch(BadTensor):
    """A tensor has another shape than the model's configuration implies."""

    def __init__(self, name: str, found: tuple[int, ...], implied: tuple[int, ...]) -> None:
        super().__init__(name, f"shape {list(found)}, config.json implies {list(implied)}")
