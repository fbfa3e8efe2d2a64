"""Which sequences of a batch see the same keys and values, and how far: those are read once for all of them.

After Juravsky et al. 2024 (Hydragen, arXiv:2402.05099), by blocks, so that whoever has hit the prefix cache gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

PARTITION: Final = 512
"""Positions that attention takes at a time: `kPartition` of attention.h."""


def shared_positions(
    tables: Sequence[list[int]], contexts: Sequence[int], block_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """How far each sequence shares its first positions with others: leaders and positions, int32 [S] each.

    Sequences of one leader (the first of them) see the same `positions`, whole partitions, in the same blocks; 0: a
    sequence shares nothing. None: no sequence does. `contexts`: positions that each has computed, before this step.
    """
    longest = [context // PARTITION for context in contexts]
    groups = _groups([index for index, partitions in enumerate(longest) if partitions], tables, longest, block_size, 0)
    if not groups:
        return None
    leaders, shared = np.arange(len(tables), dtype=np.int32), np.zeros(len(tables), dtype=np.int32)
    for partitions, members in groups:
        leaders[members], shared[members] = members[0], partitions * PARTITION
    return leaders, shared


def _groups(
    members: list[int], tables: Sequence[list[int]], longest: Sequence[int], block_size: int, known: int
) -> list[tuple[int, list[int]]]:
    """Partitions and members of the groups that save most among sequences that share their first `known` partitions."""

    def blocks_of(index: int, partition: int) -> tuple[int, ...]:
        return tuple(tables[index][partition * PARTITION // block_size : -(-(partition + 1) * PARTITION // block_size)])

    partitions = known
    while True:
        parted: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            parted.setdefault(blocks_of(index, partitions) if partitions < longest[index] else (), []).append(index)
        if len(parted) != 1 or () in parted:
            break
        partitions += 1
    parted.pop((), None)
    together = [(partitions, members)] if partitions and len(members) > 1 else []
    apart = [
        group
        for part in parted.values()
        if len(part) > 1
        for group in _groups(part, tables, longest, block_size, partitions + 1)
    ]
    return max(apart, together, key=_saved)


def _saved(groups: list[tuple[int, list[int]]]) -> int:
    """Partitions that need not be read."""
    return sum(partitions * (len(members) - 1) for partitions, members in groups)
