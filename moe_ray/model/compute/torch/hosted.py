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


Fill = Callable[[torch.Tensor, torch.Tensor, tuple[AdapterRows, ...], torch.Tensor], None]
"""Computes rows [T, D] and weights [T] with the runs of their adapters (as `ExpertCall.adapters`) into the last one."""


def tensor_entry(fill: Fill, dtype: torch.dtype) -> HostEntry:
    """An entry that calls `fill` on the host's own buffers, in the host's memory."""
    known: dict[Buffers, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def compute(buffers: Buffers, runs: Runs) -> None:
        views = known.get(buffers)
        if views is None:
            if len(known) >= _MAX_VIEWS:
                known.clear()
            views = known[buffers] = _views(buffers, dtype)
        rows, weights, out = views
        fill(rows, weights, tuple(AdapterRows(*run) for run in runs), out)

    return interpreted(compute)


def _views(buffers: Buffers, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [T, D], weights [T] and out [T, D], where they are. They own nothing: memory used again is seen as it is."""
    size, shape = buffers.count * buffers.row_bytes, (buffers.count, buffers.row_bytes // dtype.itemsize)
    rows, out = (
        torch.frombuffer(memory_at(address, size), dtype=dtype).view(shape) for address in (buffers.rows, buffers.out)
    )
    return rows, torch.frombuffer(memory_at(buffers.weights, 4 * buffers.count), dtype=torch.float32), out


def check_like(computed: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise `ValueError` unless `computed` has the shape and dtype of `rows`."""
    if computed.shape != rows.shape or computed.dtype != rows.dtype:
        became = f"{list(computed.shape)} of {computed.dtype}"
        raise ValueError(f"rows {list(rows.shape)} of {rows.dtype} became {became}")
