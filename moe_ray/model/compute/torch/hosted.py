"""Lets a host, which has bytes at addresses, compute with a function of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from moe_ray.core import AdapterRows
from moe_ray.native.host import Buffers, HostEntry, Runs, interpreted, memory_at

_MAX_VIEWS: Final = 64
"""Kept of one network: a connection uses the same memory for call after call, and making views takes longer than many a
product."""


def tensor_entry(forward: Callable[..., torch.Tensor], dtype: torch.dtype) -> HostEntry:
    """An entry that calls `forward(rows [T, D], weights [T])` on the host's own buffers, in the host's memory.

    Where rows have adapters, it is given their runs as well, as `ExpertCall.adapters`. Its result may be on a card.
    """
    known: dict[Buffers, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def compute(buffers: Buffers, runs: Runs) -> None:
        views = known.get(buffers)
        if views is None:
            if len(known) >= _MAX_VIEWS:
                known.clear()
            views = known[buffers] = _views(buffers, dtype)
        rows, weights, out = views
        adapters = (tuple(AdapterRows(*run) for run in runs),) if runs else ()
        computed = forward(rows, weights, *adapters)
        if computed.shape != rows.shape or computed.dtype != dtype:
            became = f"{list(computed.shape)} of {computed.dtype}"
            raise ValueError(f"rows {list(rows.shape)} of {dtype} became {became}")
        out.copy_(computed)

    return interpreted(compute)


def _views(buffers: Buffers, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [T, D], weights [T] and out [T, D], where they are. They own nothing: memory used again is seen as it is."""
    size, shape = buffers.count * buffers.row_bytes, (buffers.count, buffers.row_bytes // dtype.itemsize)
    rows, out = (
        torch.frombuffer(memory_at(address, size), dtype=dtype).view(shape) for address in (buffers.rows, buffers.out)
    )
    return rows, torch.frombuffer(memory_at(buffers.weights, 4 * buffers.count), dtype=torch.float32), out
