"""Grouped-query attention over a paged KV cache, for prefill chunks and decodes in one flat batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_ray.core import Batch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token queries of similar context length, attended together over a padded gather."""

    rows: torch.Tensor  # [B] flat positions of the queries
    slots: torch.Tensor  # [B, S] cache slots of each context, padded with slot 0
    mask: torch.Tensor  # [B, 1, 1, S] True where the query may look


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence."""

    start: int  # flat range of the chunk
    end: int
    slots: torch.Tensor | None  # [S] cache slots of the whole context; None: the chunk is its own context
    mask: torch.Tensor | None  # [Q, S] True where a query may look; None: plain causal


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer's attention needs to know of a batch; built once a step."""

    positions: torch.Tensor  # [T]
    slot_mapping: torch.Tensor  # [T]
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


def plan_attention(batch: Batch, block_size: int, sliding_window: int | None, device: torch.device) -> AttentionPlan:
    """Turn a batch into index tensors and masks."""
    singles, chunks = [], []
    for i, seq in enumerate(batch.sequences):
        start, end, context = batch.query_start[i], batch.query_start[i + 1], batch.context_lens[i]
        if end - start == 1:
            singles.append((context, start, seq.block_table))
        else:
            chunks.append(_chunk(start, end, context, seq.block_table, block_size, sliding_window, device))
    return AttentionPlan(
        positions=torch.tensor(batch.positions, device=device),
        slot_mapping=torch.tensor(batch.slot_mapping, device=device),
        decodes=tuple(_decode_groups(singles, block_size, sliding_window, device)),
        chunks=tuple(chunks),
    )


def attend(
    plan: AttentionPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Store k and v in the cache and return the attention output [T, heads, head_dim].

    q [T, heads, head_dim]; k, v [T, kv_heads, head_dim], rotated; cache: K and V [num_slots, kv_heads, head_dim].
    GQA: Ainslie et al. 2023 (arXiv:2305.13245); paging: Kwon et al. 2023 (arXiv:2309.06180).
    """
    k_cache, v_cache = cache
    k_cache.index_copy_(0, plan.slot_mapping, k)
    v_cache.index_copy_(0, plan.slot_mapping, v)
    out = torch.empty_like(q)
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    for group in plan.decodes:
        # The query heads of a KV head become query rows of one head: no K/V head is repeated or expanded.
        queries = q[group.rows].view(-1, kv_heads, heads // kv_heads, head_dim)
        keys = k_cache[group.slots].transpose(1, 2)  # [B, kv_heads, S, head_dim]
        values = v_cache[group.slots].transpose(1, 2)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask)
        out[group.rows] = attended.reshape(-1, heads, head_dim)
    for chunk in plan.chunks:
        queries = q[chunk.start : chunk.end].transpose(0, 1)[None]  # [1, heads, Q, head_dim]
        if chunk.slots is None:
            keys, values = k[chunk.start : chunk.end], v[chunk.start : chunk.end]
        else:
            keys, values = k_cache[chunk.slots], v_cache[chunk.slots]
        attended = F.scaled_dot_product_attention(
            queries,
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=heads != kv_heads,
        )
        out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
    return out


def _chunk(
    start: int,
    end: int,
    context: int,
    block_table: list[int],
    block_size: int,
    window: int | None,
    device: torch.device,
) -> PrefillChunk:
    first = context - (end - start)
    windowed = window is not None and context > window
    if first == 0 and not windowed:
        return PrefillChunk(start, end, None, None)
    queries = torch.arange(first, context, device=device)[:, None]
    keys = torch.arange(context, device=device)[None]
    mask = keys <= queries
    if windowed and window is not None:
        mask &= keys > queries - window
    slots = _slots([block_table], context, block_size, device)[0, :context] if first else None
    return PrefillChunk(start, end, slots, mask)


def _decode_groups(
    singles: list[tuple[int, int, list[int]]], block_size: int, window: int | None, device: torch.device
) -> list[DecodeGroup]:
    # Sequences share a padded gather only with others at most twice as long, so padding at most doubles the work.
    groups: list[list[tuple[int, int, list[int]]]] = []
    for item in sorted(singles, key=lambda single: single[0]):
        if not groups or item[0] > max(2 * groups[-1][0][0], 4 * block_size):
            groups.append([])
        groups[-1].append(item)
    out = []
    for group in groups:
        longest = group[-1][0]
        slots = _slots([table for _, _, table in group], longest, block_size, device)[:, :longest]
        lengths = torch.tensor([context for context, _, _ in group], device=device)[:, None]
        keys = torch.arange(longest, device=device)[None]
        mask = keys < lengths
        if window is not None:
            mask &= keys >= lengths - window
        rows = torch.tensor([row for _, row, _ in group], device=device)
        out.append(DecodeGroup(rows, slots, mask[:, None, None]))
    return out


def _slots(block_tables: list[list[int]], tokens: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Cache slots of each sequence's first `tokens` positions, rounded up to whole blocks, [B, blocks * block_size]."""
    blocks = -(-tokens // block_size)
    padded = [table[:blocks] + [0] * (blocks - len(table)) for table in block_tables]
    first = torch.tensor(padded, device=device)[:, :, None] * block_size
    return (first + torch.arange(block_size, device=device)).view(len(padded), -1)
