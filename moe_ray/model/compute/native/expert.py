"""An expert by the native kernels. Nothing here imports torch, unless a call comes as tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.errors import AdapterNotHeld
from moe_ray.model.lora.parts import ExpertPart
from moe_ray.native.additions import AdditionPacker, BlockPart, ExpertAdapter, packed_runs
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


class NativeFFN:
    """`base.FFN` by the native kernels: sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w13: Packed, w2: Packed, kernels: Kernels, dtype: str) -> None:
        """w13: gate and up [I, D] in one block; w2 [D, I]; D and I multiples of 32. `dtype`: of rows."""
        self.w13, self.w2, self.kernels, self.dtype = w13, w2, kernels, dtype
        self.nbytes = w13.nbytes + w2.nbytes
        self._adapters: dict[int, _Held | None] = {}

    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        if not adapters:
            return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2)
        held = [self._held(run.adapter_id) for run in adapters]  # lives while it computes
        runs = packed_runs(
            [
                (run.adapter_id, None if each is None else each.address, run.count)
                for run, each in zip(adapters, held, strict=True)
            ]
        )
        return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2, runs)

    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        if adapter_id in self._adapters:
            return  # of the same content, by its id; the memory that it is known by must stay
        inner, hidden = self.w13.shape.n, self.w13.shape.k
        held = None
        if part.gate or part.up or part.down:
            packer = AdditionPacker(self.kernels, self.dtype)
            w13 = packer.pack([BlockPart(part.gate, inner), BlockPart(part.up, inner)], alternate=True)
            held = _Held(ExpertAdapter(w13, packer.pack([BlockPart(part.down, hidden)])), packer)
        self._adapters = {**self._adapters, adapter_id: held}

    def remove_adapter(self, adapter_id: int) -> None:
        self._adapters = {number: held for number, held in self._adapters.items() if number != adapter_id}

    def has_adapter(self, adapter_id: int) -> bool:
        return adapter_id in self._adapters

    @property
    def adapter_bytes(self) -> int:
        return sum(held.packer.nbytes for held in self._adapters.values() if held is not None)

    def adapter_handle(self, adapter_id: int) -> int | None:
        held = self._held(adapter_id)
        return None if held is None else held.address

    def _held(self, adapter_id: int) -> _Held | None:
        if not adapter_id:
            return None
        if adapter_id not in (adapters := self._adapters):
            raise AdapterNotHeld(f"adapter {adapter_id} is not held by this expert")
        return adapters[adapter_id]

    def buffers(self) -> list[memoryview]:
        return [memoryview(self.w13.memory), memoryview(self.w2.memory)]

    def entry(self) -> HostEntry:
        """The kernel's own function over the packed weights."""
        return self.kernels.expert_entry(self.w13, self.w2, self.dtype)
