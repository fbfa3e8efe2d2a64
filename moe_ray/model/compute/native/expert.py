"""An expert by the native kernels. Nothing here imports torch, unless a call comes as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_ray.native.host import HostEntry
from moe_ray.native.kernels import Kernels, Packed

if TYPE_CHECKING:
    import numpy as np
    import torch


class NativeFFN:
    """`base.FFN` for bfloat16 on a CPU: sums in float32, a row's result independent of its neighbours."""

    def __init__(self, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, kernels: Kernels) -> None:
        """w1 and w3 [I, D], w2 [D, I], of bfloat16 items; D and I multiples of 32."""
        self._hold(kernels.pack(w1, w3), kernels.pack(w2), kernels)

    @classmethod
    def packed(cls, w13: Packed, w2: Packed, kernels: Kernels) -> NativeFFN:
        """Of weights that are packed already."""
        ffn = cls.__new__(cls)
        ffn._hold(w13, w2, kernels)
        return ffn

    def _hold(self, w13: Packed, w2: Packed, kernels: Kernels) -> None:
        self.w13, self.w2, self.kernels = w13, w2, kernels
        self.nbytes = w13.nbytes + w2.nbytes

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.kernels.expert_ffn(rows.contiguous(), weights.contiguous(), self.w13, self.w2)

    def buffers(self) -> list[memoryview]:
        return [memoryview(self.w13.memory), memoryview(self.w2.memory)]

    def entry(self) -> HostEntry:
        """The kernel's own function over the packed weights."""
        return self.kernels.expert_entry(self.w13, self.w2)
