"""An expert by Triton's kernels: sums in float32, a row's result independent of its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_ray.core import AdapterRows
from moe_ray.model.compute.torch.expert import bytes_of
from moe_ray.model.compute.torch.low_rank import Thin
from moe_ray.model.compute.triton import products
from moe_ray.model.compute.triton.launch import Launch
from moe_ray.model.compute.triton.tiles import TiledWeight, tiled_floats
from moe_ray.model.families import ClampedSwiGLU
from moe_ray.model.lora.network_adapters import NetworkAdapters
from moe_ray.model.lora.parts import ExpertPart


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """What an expert holds: gate and up [I, D] in turns, down [D, I], and biases in float32, all or none."""

    w13: TiledWeight
    w2: TiledWeight
    bias13: torch.Tensor | None = None  # [2 I], gate's above up's
    bias2: torch.Tensor | None = None  # [D]

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in a fixed order."""
        biases = (self.bias13, self.bias2)
        return [*self.w13.tensors(), *self.w2.tensors(), *(each for each in biases if each is not None)]

    def over(self, tensors: Sequence[torch.Tensor]) -> ExpertWeights:
        """Weights of this layout in other memory: `tensors` in the same order."""
        given = iter(tensors)
        w13, w2 = self.w13.over(given), self.w2.over(given)
        return ExpertWeights(w13, w2, *(None if each is None else next(given) for each in (self.bias13, self.bias2)))

    def to(self, device: torch.device) -> ExpertWeights:
        """The same on another device."""
        biases = [None if each is None else each.to(device) for each in (self.bias13, self.bias2)]
        return ExpertWeights(self.w13.to(device), self.w2.to(device), *biases)


@dataclass(frozen=True, slots=True, eq=False)
class _TiledThin:
    """Adds x a^T b^T to x W^T."""

    a: TiledWeight
    b: TiledWeight

    @staticmethod
    def of(thin: Thin | None) -> _TiledThin | None:
        if thin is None:
            return None
        return _TiledThin(tiled_floats([thin.a], thin.a.dtype), tiled_floats([thin.b], thin.b.dtype))

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def launches(self, x: torch.Tensor, out: torch.Tensor) -> Iterator[Launch]:
        """x [T, K] a^T b^T into float32 `out` [T, N]."""
        between = x.new_empty(1, len(x), self.a.how.n)
        yield products.product(self.a, x, between)
        yield products.product(self.b, between[0], out[None])


@dataclass(frozen=True, slots=True, eq=False)
class _Addition:
    """What one adapter adds."""

    w13: _TiledThin | None
    w2: _TiledThin | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.w13, self.w2) if each is not None)


class TritonFFN(NetworkAdapters[_Addition]):
    """`base.FFN` by Triton: two launches and one that adds the parts of the second's sums, whatever is held."""

    def __init__(self, weights: ExpertWeights, clamped: ClampedSwiGLU | None = None) -> None:
        """`clamped`: how gate and up are combined; None: SwiGLU."""
        super().__init__()
        self.weights, self._clamped = weights, clamped
        self.nbytes = sum(each.nbytes for each in weights.tensors())
        self._parts = products.parts_of(weights.w2)

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        with torch.inference_mode():
            out = torch.empty_like(rows, memory_format=torch.contiguous_format)
            for launch in self.launches(rows.contiguous(), weights.contiguous(), out, adapters):
                launch.run()
        return out

    def launches(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        adapters: tuple[AdapterRows, ...] = (),
    ) -> Iterator[Launch]:
        """What `forward` has computed, each to be run before the next is asked for. Raises `AdapterNotHeld`.

        Tensors on the `meta` device give the launches of such rows and weights without any memory.
        """
        runs = self.runs_with_adapters(adapters)
        for start in range(0, len(rows), products.MOST_ROWS):
            part = slice(start, start + products.MOST_ROWS)
            yield from self._some(rows[part], weights[part], out[part], _within(runs, part, len(rows)))

    def _some(
        self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, runs: list[tuple[slice, _Addition]]
    ) -> Iterator[Launch]:
        held, count = self.weights, len(rows)
        wide, hidden = held.w13.how.n, held.w2.how.n
        of_13 = [(part, each.w13) for part, each in runs if each.w13 is not None]
        of_2 = [(part, each.w2) for part, each in runs if each.w2 is not None]
        extra = rows.new_zeros(count, 2 * wide, dtype=torch.float32) if of_13 else None
        for part, thin in of_13:
            assert extra is not None
            yield from thin.launches(rows[part], extra[part])
        inner = rows.new_empty(count, wide)
        yield products.gate_up(held.w13, rows, inner, held.bias13, extra, self._clamped)
        extra = rows.new_zeros(count, hidden, dtype=torch.float32) if of_2 else None
        for part, thin in of_2:
            assert extra is not None
            yield from thin.launches(inner[part], extra[part])
        sums = rows.new_empty(self._parts, count, hidden, dtype=torch.float32)
        yield products.product(held.w2, inner, sums)
        yield products.finish(sums, out, held.bias2, extra, weights)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return tuple(self.weights.tensors())

    def over(self, tensors: Sequence[torch.Tensor]) -> TritonFFN:
        """A network of this kind without adapters over other memory, of `tensors` in their order."""
        return TritonFFN(self.weights.over(tensors), self._clamped)

    def buffers(self) -> list[memoryview]:
        """The bytes of its weights: of its own tensors on a CPU, of copies elsewhere."""
        return [bytes_of(each) for each in self.weights.tensors()]

    def entry(self) -> None:
        """None: kernels are launched through the interpreter, as torch's are."""
        return

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        w2 = self.weights.w2
        inner, hidden = w2.how.k, w2.how.n
        like = torch.empty(0, dtype=w2.how.dtype, device=w2.codes.device)

        def make() -> _Addition:
            with torch.inference_mode():
                return _Addition(
                    _TiledThin.of(Thin.above((part.gate, part.up), (inner, inner), like)),
                    _TiledThin.of(Thin.above((part.down,), (hidden,), like)),
                )

        self.hold_adapter(adapter_id, make)

    @property
    def adapter_bytes(self) -> int:
        return sum(held.nbytes for held in self._adapters.values())

    def adapter_handle(self, adapter_id: int) -> None:
        """None: it goes by the id."""
        self.held_adapter(adapter_id)


def _within(runs: list[tuple[slice, _Addition]], part: slice, count: int) -> list[tuple[slice, _Addition]]:
    """The runs of the rows of `part`, counted from its first row."""
    found = []
    end = min(part.stop, count)
    for rows, each in runs:
        first, last = max(rows.start, part.start), min(rows.stop, end)
        if first < last:
            found.append((slice(first - part.start, last - part.start), each))
    return found
