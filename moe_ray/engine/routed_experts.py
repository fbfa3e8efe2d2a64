"""Which experts each token of a sequence went to: from a step's batch into events, and together again. No torch."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from moe_ray.core import Batch, RoutedExperts, Sequence
from moe_ray.errors import ProtocolError

_DTYPES: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("u1"), 2: np.dtype("<u2")}
"""Bytes of an expert's number → how it is written."""


def prepare(batch: Batch, layers: int, experts: int, top_k: int) -> None:
    """Give `batch` room for the experts of its tokens, if one of its sequences asks for them."""
    if any(seq.request.sampling.return_routed_experts for seq in batch.sequences):
        batch.routed = np.empty((batch.num_tokens, layers, top_k), _DTYPES[1 if experts <= 256 else 2])


def keep(batch: Batch) -> None:
    """Give each sequence that asks the experts of its newly computed positions; after `Scheduler.update`.

    Positions are kept in order and once each: what is computed again after preemption is known already. A sequence's
    last token is not computed, and what was computed of wrong drafts, or of right ones behind its end, is not kept.
    """
    if batch.routed is None:
        return
    for i, seq in enumerate(batch.sequences):
        if seq.request.sampling.return_routed_experts:
            start = batch.positions[batch.query_start[i]]
            assert start <= seq.num_routed
            end = min(batch.context_lens[i], len(seq.token_ids) - 1)
            first = batch.query_start[i] - start  # flat position of the sequence's position 0, were it here
            seq.routed += batch.routed[first + seq.num_routed : first + max(end, seq.num_routed)].tobytes()
            seq.num_routed = max(end, seq.num_routed)


def tell(seq: Sequence, batch: Batch) -> RoutedExperts | None:
    """Take from a sequence what is in no event yet; `batch` is one that it was in. None: there is nothing."""
    if batch.routed is None or not seq.routed:
        return None
    _, layers, top_k = batch.routed.shape
    count = len(seq.routed) // (layers * top_k * batch.routed.itemsize)
    told = RoutedExperts(seq.num_routed - count, (count, layers, top_k), bytes(seq.routed))
    seq.routed.clear()
    return told


def as_array(told: RoutedExperts) -> np.ndarray:
    """Return the experts as [positions, layers, K]. Raises `ProtocolError` where data and shape do not fit together."""
    cells = math.prod(told.shape)
    dtype = _DTYPES.get(len(told.data) // cells) if cells else None
    if dtype is None or len(told.data) != cells * dtype.itemsize:
        raise ProtocolError(f"{len(told.data)} bytes cannot be the experts of {told.shape} positions, layers and top k")
    return np.frombuffer(told.data, dtype).reshape(told.shape)


class RoutedRows:
    """Puts together what events tell of one sequence, by position: a replay on another trunk tells positions again."""

    def __init__(self) -> None:
        self.count = 0
        """Leading positions that are known."""
        self._data = bytearray()
        self._kind: tuple[int, int, np.dtype[Any]] | None = None

    def take(self, told: RoutedExperts) -> None:
        """Add the positions that are new. Raises `ProtocolError` if one before them was left out."""
        rows = as_array(told)
        kind = (*told.shape[1:], rows.dtype)
        if told.start > self.count or kind != (self._kind or kind):
            known = f"{self.count} positions of (layers, top k, dtype) {self._kind}"
            raise ProtocolError(f"experts from position {told.start} on, {kind} each, do not follow {known}")
        self._kind = kind
        self._data += rows[self.count - told.start :].tobytes()
        self.count = max(self.count, told.start + len(rows))

    def rows(self, start: int, end: int) -> np.ndarray:
        """A copy of the experts of positions [start, min(end, count)): [positions, layers, K]; [0, 0, 0] at first."""
        if self._kind is None:
            return np.empty((0, 0, 0), _DTYPES[1])
        layers, top_k, dtype = self._kind
        width = layers * top_k * dtype.itemsize
        return np.frombuffer(self._data[start * width : end * width], dtype).reshape(-1, layers, top_k)
