"""An expert by the native kernels. Nothing here imports torch, unless a call comes as tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.model.lora.network_adapters import NetworkAdapters
from moe_ray.model.lora.parts import ExpertPart
from moe_ray.native.additions import AdditionPacker, BlockPart, ExpertAdapter, packed_runs
from moe_ray.native.gating import Gating
from moe_ray.native.host import HostEntry
from moe_ray.native.kernels import Kernels, Packed

if TYPE_CHECKING:
    import torch

    from moe_ray.core import AdapterRows


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """What one adapter adds, as the kernels read it."""

    struct: ExpertAdapter
    packer: AdditionPacker

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class NativeFFN(NetworkAdapters[_Held | None]):
    """`base.FFN` by the native kernels: sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w13: Packed, w2: Packed, kernels: Kernels, dtype: str, gating: Gating | None = None) -> None:
        """w13: gate and up [I, D] in one block; w2 [D, I]; D and I multiples of 32. `dtype`: of rows.

        `gating`: biases, and how gate and up are combined; default: SwiGLU without biases.
        """
        self.w13, self.w2, self.kernels, self.dtype = w13, w2, kernels, dtype
        self._gating = gating or Gating()
        self.nbytes = w13.nbytes + w2.nbytes + self._gating.nbytes
        super().__init__()

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        if not adapters:
            return self._compute(rows, weights)
        held = [self._held(run.adapter_id) for run in adapters]  # lives while it computes
        runs = packed_runs(
            [
                (run.adapter_id, None if each is None else each.address, run.count)
                for run, each in zip(adapters, held, strict=True)
            ]
        )
        return self._compute(rows, weights, runs)

    def _compute(self, rows: torch.Tensor, weights: torch.Tensor, runs: bytes = b"") -> torch.Tensor:
        return self.kernels.expert_ffn(
            rows.contiguous(), weights.contiguous(), self.w13, self.w2, runs, gating=self._gating
        )

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        inner, hidden = self.w13.shape.n, self.w13.shape.k

        def make() -> _Held | None:
            if not (part.gate or part.up or part.down):
                return None
            packer = AdditionPacker(self.kernels, self.dtype)
            w13 = packer.pack([BlockPart(part.gate, inner), BlockPart(part.up, inner)], alternate=True)
            return _Held(ExpertAdapter(w13, packer.pack([BlockPart(part.down, hidden)])), packer)

        self.hold_adapter(adapter_id, make)

    @property
    def adapter_bytes(self) -> int:
        return sum(held.packer.nbytes for held in self._adapters.values() if held is not None)

    def adapter_handle(self, adapter_id: int) -> int | None:
        held = self._held(adapter_id)
        return None if held is None else held.address

    def _held(self, adapter_id: int) -> _Held | None:
        return self.held_adapter(adapter_id) if adapter_id else None

    def buffers(self) -> list[memoryview]:
        return [memoryview(self.w13.memory), memoryview(self.w2.memory), *self._gating.buffers()]

    def entry(self) -> HostEntry:
        """The kernel's own function over the packed weights."""
        return self.kernels.expert_entry(self.w13, self.w2, self.dtype, self._gating)
