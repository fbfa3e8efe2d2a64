"""What a step's attention needs to know of its batch: worked out on the host, brought to the device in one copy.

With static shapes a batch of decodes is padded, so that its tensors take one of few shapes and a CUDA graph captured
for one batch fits the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from moe_ray.core import Batch
from moe_ray.model.compute.base import KVCacheView

MOST_GATHERED: Final = 1 << 17
"""Positions that a group's padded gather holds at most, unless one sequence alone has more."""
MOST_RECORDED: Final = 512
"""Tokens of a step of decoding that is recorded: a card computes more for longer than an interpreter launches them."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token queries of similar context length, attended together over a padded gather."""

    rows: torch.Tensor  # [B] flat positions of the queries
    slots: torch.Tensor  # [B, S] cache slots of each context, padded with slot 0
    mask: torch.Tensor  # [B, 1, 1, S] True where the query may look
    full_mask: torch.Tensor  # the same for layers without a window


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence."""

    start: int  # flat range of the chunk
    end: int
    slots: torch.Tensor | None  # [S] cache slots of the whole context; None: the chunk is its own context
    mask: torch.Tensor | None  # [Q, S] True where a query may look; None: plain causal
    full_mask: torch.Tensor | None  # the same for layers without a window


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step's inputs, and what every layer's attention needs to know of the batch; built once a step."""

    num_tokens: int
    """T: the batch's own. From there on to P is padding, whose K and V go to a slot that no block has."""
    padded: bool
    """Whether tensors have static shapes; then P may be more than T."""
    token_ids: torch.Tensor  # [P]
    positions: torch.Tensor  # [P]
    slot_mapping: torch.Tensor  # [P]
    real: torch.Tensor  # [1] T, for what is recorded for any T up to P
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all tensors of a plan without chunks: plans of equal shapes can replay one graph."""
        return (tuple(self.positions.shape), *(tuple(group.slots.shape) for group in self.decodes))

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of a plan without chunks, in one order."""
        yield from (self.token_ids, self.positions, self.slot_mapping, self.real)
        for group in self.decodes:
            yield from (group.rows, group.slots, group.mask, group.full_mask)


@dataclass(frozen=True, slots=True)
class _Single:
    context: int
    row: int
    block_table: list[int]


def plan_step(
    batch: Batch, cache: KVCacheView, sliding_window: int | None, device: torch.device, static_shapes: bool = False
) -> StepPlan:
    """Turn a batch into index tensors and masks on `device`, without waiting for it.

    `static_shapes`: pad a batch of decodes alone: tokens and sequences of a group as `padded_count` says, contexts to
    powers of two.
    """
    singles, chunks, block_size = [], [], cache.block_size
    for i, seq in enumerate(batch.sequences):
        start, end, context = batch.query_start[i], batch.query_start[i + 1], batch.context_lens[i]
        if end - start == 1:
            singles.append(_Single(context, start, seq.block_table))
        else:
            chunks.append((start, end, context, seq.block_table))
    static = static_shapes and not chunks
    padding = padded_count(batch.num_tokens) - batch.num_tokens if static else 0
    groups = _static_groups(singles, block_size) if static else _groups(singles, block_size)
    lengths = [_length(group, block_size, static) for group in groups]
    host = [
        np.array(values + [filler] * padding, dtype=np.int64)
        for values, filler in ((batch.token_ids, 0), (batch.positions, 0), (batch.slot_mapping, cache.spare_slot))
    ]
    host.append(np.array([batch.num_tokens], dtype=np.int64))
    for group, length in zip(groups, lengths, strict=True):
        host += [
            np.array([single.row for single in group]),
            _slots([single.block_table for single in group], length, block_size),
            np.array([single.context for single in group]),
        ]
    host += [_slots([table], context, block_size)[0] for start, end, context, table in chunks if context > end - start]
    arrived = iter(to_device(host, device))
    token_ids, positions, slot_mapping, real = (next(arrived) for _ in range(4))
    decodes = [_decode_group(next(arrived), next(arrived), next(arrived), sliding_window) for _ in groups]
    prefills = [
        _prefill_chunk(start, end, context, next(arrived) if context > end - start else None, sliding_window, device)
        for start, end, context, _ in chunks
    ]
    inputs = (token_ids, positions, slot_mapping, real)
    return StepPlan(batch.num_tokens, static, *inputs, tuple(decodes), tuple(prefills))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def padded_count(number: int) -> int:
    """To how many rows a step of `number` is padded: 1, 2, 4, 8, then multiples of 8, and beyond 64 of 16.

    Few sizes, so that few recordings serve all numbers of sequences: 39 up to 512. Products are computed in tiles of 16
    rows or more, so up to 64 padding costs a tile in one case of two at most, and beyond it less than a fifth.
    """
    if number <= 8:
        return power_of_two(number)
    step = 8 if number <= 64 else 16
    return -(-number // step) * step


def _groups(singles: Sequence[_Single], block_size: int) -> list[list[_Single]]:
    # Sequences share a padded gather only with others at most twice as long, so padding at most doubles the work.
    groups: list[list[_Single]] = []
    for single in sorted(singles, key=lambda single: single.context):
        group = groups[-1] if groups else []
        fits = single.context <= max(2 * group[0].context, 4 * block_size) if group else False
        if not fits or (len(group) + 1) * single.context > MOST_GATHERED:
            groups.append([])
        groups[-1].append(single)
    return groups


def _static_groups(singles: Sequence[_Single], block_size: int) -> list[list[_Single]]:
    # As few groups as padding at most doubles the work of: shapes of several differ in the sizes of each. What pads a
    # group computes its first query once more.
    groups: list[list[_Single]] = []
    length = useful = 0
    for single in sorted(singles, key=lambda single: -single.context):
        own = _length([single], block_size, True)
        padded = length * padded_count(len(groups[-1]) + 1) if groups else 0
        if not groups or padded > min(2 * (useful + own), MOST_GATHERED):
            groups.append([])
            length, useful = own, 0
        groups[-1].append(single)
        useful += own
    return [group + group[:1] * (padded_count(len(group)) - len(group)) for group in groups]


def _length(group: Sequence[_Single], block_size: int, static: bool) -> int:
    longest = max(single.context for single in group)
    return power_of_two(max(longest, 4 * block_size)) if static else longest


def _slots(block_tables: Sequence[list[int]], tokens: int, block_size: int) -> np.ndarray:
    """Cache slots of each sequence's first `tokens` positions, [B, tokens]; slot 0 and on where it has fewer blocks."""
    blocks = np.zeros((len(block_tables), -(-tokens // block_size)), dtype=np.int64)
    for i, table in enumerate(block_tables):
        known = table[: blocks.shape[1]]
        blocks[i, : len(known)] = known
    slots = blocks[:, :, None] * block_size + np.arange(block_size)
    return slots.reshape(len(block_tables), -1)[:, :tokens]


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors of these values on `device`, brought there by one copy that nothing waits for.

    Each begins at a multiple of 16 bytes, as what is allocated does: kernels are compiled for it.
    """
    filler = np.zeros(1, np.int64)
    flat = [each for array in arrays for each in (array.reshape(-1), filler[: array.size % 2])]
    packed = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = torch.split(packed.to(device, non_blocking=True), [array.size + array.size % 2 for array in arrays])
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _decode_group(rows: torch.Tensor, slots: torch.Tensor, contexts: torch.Tensor, window: int | None) -> DecodeGroup:
    keys, lengths = torch.arange(slots.shape[1], device=slots.device)[None], contexts[:, None]
    full_mask = mask = keys < lengths
    if window is not None:
        mask = mask & (keys >= lengths - window)
    return DecodeGroup(rows, slots, mask[:, None, None], full_mask[:, None, None])


def _prefill_chunk(
    start: int, end: int, context: int, slots: torch.Tensor | None, window: int | None, device: torch.device
) -> PrefillChunk:
    windowed = window is not None and context > window
    if slots is None and not windowed:
        return PrefillChunk(start, end, None, None, None)
    queries = torch.arange(context - (end - start), context, device=device)[:, None]
    keys = torch.arange(context, device=device)[None]
    full_mask = mask = keys <= queries
    if windowed and window is not None:
        mask = mask & (keys > queries - window)
    return PrefillChunk(start, end, slots, mask, None if slots is None else full_mask)
