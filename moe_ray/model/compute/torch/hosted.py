"""Lets a host, which has bytes, compute with a function of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_ray.native.host import Entry, interpreted


def tensor_entry(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> Entry:
    """An entry that calls `forward(rows [T, D], weights [T])` on `device`: on a CPU, on the host's own buffers."""

    def compute(rows: memoryview, weights: memoryview, out: memoryview) -> None:
        factors = torch.frombuffer(weights, dtype=torch.float32)  # [T]
        x = torch.frombuffer(rows, dtype=dtype).view(factors.shape[0], -1)  # [T, D]
        y = forward(x.to(device), factors.to(device))
        if y.shape != x.shape or y.dtype != dtype:
            raise ValueError(f"rows {list(x.shape)} of {dtype} became {list(y.shape)} of {y.dtype}")
        torch.frombuffer(out, dtype=dtype).view_as(y).copy_(y)

    return interpreted(compute)
