"""Grouped-query attention over a paged KV cache, for prefill chunks and decodes in one flat batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_ray.model.compute.base import LayerCache
from moe_ray.model.compute.torch.kv_rows import keep, recall
from moe_ray.model.compute.torch.plan import StepPlan


def attend(
    plan: StepPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, scale: float | None = None
) -> torch.Tensor:
    """Store k and v in the cache and return the attention output [P, heads, head_dim].

    q [P, heads, head_dim]; k, v [P, kv_heads, head_dim], rotated. `scale` of products; default: head_dim ** -0.5.
    GQA: Ainslie et al. 2023 (arXiv:2305.13245); paging: Kwon et al. 2023 (arXiv:2309.06180).
    """
    k, v = keep(cache, plan.slot_mapping, k, v)
    # Zeros where a padded batch has rows that no group covers: they must stay finite.
    out = torch.zeros_like(q) if plan.padded else torch.empty_like(q)
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    for group in plan.decodes:
        # The query heads of a KV head become query rows of one head: no K/V head is repeated or expanded.
        queries = q[group.rows].view(-1, kv_heads, heads // kv_heads, head_dim)
        keys, values = recall(cache, group.slots, q.dtype)  # [B, S, kv_heads, head_dim]
        attended = F.scaled_dot_product_attention(
            queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=group.mask, scale=scale
        )
        out[group.rows] = attended.reshape(-1, heads, head_dim)
    for chunk in plan.chunks:
        queries = q[chunk.start : chunk.end].transpose(0, 1)[None]  # [1, heads, Q, head_dim]
        if chunk.slots is None:
            keys, values = k[chunk.start : chunk.end], v[chunk.start : chunk.end]
        else:
            keys, values = recall(cache, chunk.slots, q.dtype)
        attended = F.scaled_dot_product_attention(
            queries,
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
    return out
