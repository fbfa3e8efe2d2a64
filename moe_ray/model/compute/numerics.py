"""How one process holds and computes tensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.native.kernels import Kernels

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Numerics:
    """By name, so that what computes natively need not import torch."""

    dtype: str  # "float32", "bfloat16", "float16"
    device: str  # "cpu", "cuda"
    kernels: Kernels | None = None
    """Native kernels with this process's compute threads, where they are wanted and work."""

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)


def limit_torch_threads(count: int) -> None:
    """Let torch compute on `count` threads in this process, be it imported already or later."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # read when torch is loaded
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
