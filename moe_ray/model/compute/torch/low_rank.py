"""What adapters add, by torch: for all adapters of a batch at once, in two products for each block of matrices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model.compute.base import HeldMatrix
from moe_ray.model.lora.parts import LowRank, MatrixPart, TrunkPart
from moe_ray.model.lora.step import StepAdapters
from moe_ray.model.matrix import tensor_of

if TYPE_CHECKING:
    from moe_ray.model.lora.adapter_file import Adapter


@dataclass(frozen=True, slots=True)
class Thin:
    """Adds x a^T b^T to x W^T."""

    a: torch.Tensor  # [r, K]
    b: torch.Tensor  # [N, r], times the scale

    @staticmethod
    def of(low_rank: LowRank, dtype: torch.dtype, device: torch.device) -> Thin:
        a, b = tensor_of(low_rank.a.copy()), tensor_of(low_rank.b.copy()).float() * low_rank.scale
        return Thin(a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype))

    @staticmethod
    def above(parts: Sequence[LowRank | None], outputs: Sequence[int], like: torch.Tensor) -> Thin | None:
        """The addition to matrices that lie one above the other, of so many outputs each; in the form of `like`."""
        found = [None if part is None else Thin.of(part, like.dtype, like.device) for part in parts]
        present = [each for each in found if each is not None]
        if not present:
            return None
        b = like.new_zeros(sum(outputs), sum(each.rank for each in present))
        row = column = 0
        for each, count in zip(found, outputs, strict=True):
            if each is not None:
                b[row : row + count, column : column + each.rank] = each.b
                column += each.rank
            row += count
        return Thin(torch.cat([each.a for each in present]), b)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N] of x [T, K]."""
        return F.linear(F.linear(x, self.a), self.b)


@dataclass(frozen=True, slots=True)
class ThinLayer:
    """What one adapter adds to a layer of the trunk."""

    qkv: Thin | None
    out: Thin | None
    gate: Thin | None
    share: Thin | None


_NOTHING = ThinLayer(None, None, None, None)


class TorchAdapter:
    """One adapter of a trunk."""

    def __init__(
        self, adapter: Adapter, layers: Sequence[tuple[tuple[int, int, int], int]], like: torch.Tensor
    ) -> None:
        """Read what it adds. `layers`: outputs of q, k and v, and of the gate. Raises `AdapterError`."""
        part: TrunkPart = adapter.trunk_part()
        self.expert_layers = frozenset(filter(adapter.touches_experts, range(len(layers))))
        hidden = like.shape[1]
        self.layers = [
            ThinLayer(
                Thin.above((each.q, each.k, each.v), qkv, like),
                Thin.above((each.out,), (hidden,), like),
                Thin.above((each.router,), (experts,), like),
                Thin.above((each.share,), (1,), like),
            )
            for each, (qkv, experts) in zip(part.layers, layers, strict=True)
        ]
        self.shared = [each.shared for each in part.layers]
        """What is added to each layer's shared expert."""
        self.embed, self.embed_whole = _matrix(part.embed, like)
        self.head, self.head_whole = _matrix(part.head, like)
        thins = [thin for each in self.layers for thin in (each.qkv, each.out, each.gate, each.share)]
        held = [*thins, self.embed, self.embed_whole, self.head, self.head_whole]
        self.nbytes = sum(each.nbytes for each in held if each is not None)


def _matrix(part: MatrixPart | None, like: torch.Tensor) -> tuple[Thin | None, torch.Tensor | None]:
    if part is None:
        return None, None
    whole = None if part.whole is None else tensor_of(part.whole).to(device=like.device, dtype=like.dtype)
    return None if part.low_rank is None else Thin.of(part.low_rank, like.dtype, like.device), whole


@dataclass(frozen=True, slots=True)
class _Joined:
    """The additions of several adapters to one block, side by side."""

    thin: Thin
    run_of: torch.Tensor  # [R] to which of the step's runs each rank belongs


class Joins:
    """The additions of the adapters of the last batch side by side, for batches of the same adapters that follow."""

    def __init__(self) -> None:
        self._ids: tuple[int, ...] = ()
        self._joined: dict[tuple[int, ...], _Joined] = {}

    def of(self, ids: tuple[int, ...]) -> dict[tuple[int, ...], _Joined]:
        """Those of runs with these adapters, by the identities of what was joined."""
        if ids != self._ids:
            self._ids, self._joined = ids, {}
        return self._joined

    def forget(self) -> None:
        """Adapters come or go."""
        self._ids, self._joined = (), {}


class TorchStepAdapters(StepAdapters[TorchAdapter]):
    """The adapters of one batch."""

    def __init__(self, batch: Batch, held: Mapping[int, TorchAdapter], joins: Joins, device: torch.device) -> None:
        super().__init__(batch, held)
        self._joined = joins.of(tuple(run.adapter_id for run in self.runs)) if self.runs else {}
        self._first = next((run.start for run in self.runs if run.held is not None), 0)
        self._end = self.runs[-1].end if self.runs else 0
        lengths = [max(run.end - max(run.start, self._first), 0) for run in self.runs]
        run_of_row = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        self._run_of_row = run_of_row.to(device, non_blocking=True)  # [T - first]

    def layer(self, index: int) -> list[ThinLayer]:
        """What each run's adapter adds to a layer."""
        return [_NOTHING if run.held is None else run.held.layers[index] for run in self.runs]

    def embed(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The model's embeddings [P, D] of tokens [P], changed for those whose adapters say so."""
        for run in self.runs:
            if run.held is None:
                continue
            rows = slice(run.start, run.end)
            if run.held.embed_whole is not None:
                hidden[rows] = F.embedding(ids[rows], run.held.embed_whole)
            if run.held.embed is not None:
                hidden[rows] += F.linear(F.embedding(ids[rows], run.held.embed.a.T), run.held.embed.b)
        return hidden

    def logits(
        self,
        rows: Sequence[int],
        x: torch.Tensor,
        head: HeldMatrix,
        bias: torch.Tensor | None,
        linear: Callable[[torch.Tensor, HeldMatrix, torch.Tensor | None], torch.Tensor],
    ) -> torch.Tensor:
        """Logits [len(rows), V] of x [len(rows), D], which are of these flat positions, ascending; by `linear`."""
        if not any(run.held is not None and (run.held.head or run.held.head_whole is not None) for run in self.runs):
            return linear(x, head, bias)
        parts, start = [], 0
        for run in self.runs:
            end = bisect_left(rows, run.end)
            part = x[start:end]
            whole = None if run.held is None else run.held.head_whole
            logits = linear(part, head if whole is None else whole, bias)
            parts.append(logits if run.held is None or run.held.head is None else logits + run.held.head.apply(part))
            start = end
        return torch.cat(parts)

    def add(self, to: torch.Tensor, x: torch.Tensor, thins: Sequence[Thin | None]) -> torch.Tensor:
        """x W^T [P, N] with what each run's adapter adds to it for x [P, K]; None: nothing for these tokens."""
        present = [(index, thin) for index, thin in enumerate(thins) if thin is not None]
        if not present:
            return to
        key = tuple(id(thin) for _, thin in present)
        joined = self._joined.get(key)
        if joined is None:
            joined = self._joined[key] = _join(present)
        rows = slice(self._first, self._end)
        y = F.linear(x[rows], joined.thin.a)  # [T - first, R]
        y = y.masked_fill(self._run_of_row[:, None] != joined.run_of, 0.0)
        to[rows] += F.linear(y, joined.thin.b)
        return to


def _join(present: Sequence[tuple[int, Thin]]) -> _Joined:
    thins = [thin for _, thin in present]
    run_of = torch.tensor([index for index, thin in present for _ in range(thin.rank)])
    run_of = run_of.to(thins[0].a.device, non_blocking=True)
    if len(thins) == 1:
        return _Joined(thins[0], run_of)
    return _Joined(Thin(torch.cat([thin.a for thin in thins]), torch.cat([thin.b for thin in thins], dim=1)), run_of)
