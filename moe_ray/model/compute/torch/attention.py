"""Grouped-query attention over a paged KV cache, for prefill chunks and decodes in one flat batch."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.model.compute.base import LayerCache
from moe_ray.model.compute.torch.kv_rows import keep, recall
from moe_ray.model.compute.torch.plan import StepPlan

MOST_SCORES: Final = 1 << 26
"""Products of queries and keys that are held at once where there are sinks, unless one query's alone are more."""


def attend(
    plan: StepPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: LayerCache,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    full: bool = False,
) -> torch.Tensor:
    """Store k and v in the cache and return the attention output [P, heads, head_dim].

    q [P, heads, head_dim]; k, v [P, kv_heads, head_dim], rotated; v may be k. `scale` of products; default:
    head_dim ** -0.5. `sinks` [heads]: logits that count in the softmax of each head, and have no value. `full`: the
    layer has no window.
    GQA: Ainslie et al. 2023 (arXiv:2305.13245); paging: Kwon et al. 2023 (arXiv:2309.06180).
    """
    k, v = keep(cache, plan.slot_mapping, k, v)
    # Zeros where a padded batch has rows that no group covers: they must stay finite.
    out = torch.zeros_like(q) if plan.padded else torch.empty_like(q)
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    for group in plan.decodes:
        # The query heads of a KV head become query rows of one head: no K/V head is repeated or expanded.
        queries = q[group.rows].view(-1, kv_heads, heads // kv_heads, head_dim)
        keys, values = (each.transpose(1, 2) for each in recall(cache, group.slots, q.dtype))  # [B, kv_heads, S, hd]
        seen = group.full_mask if full else group.mask
        if sinks is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale)
        else:
            attended = _with_sinks(queries, keys, values, seen, scale, sinks.view(kv_heads, -1, 1))
        out[group.rows] = attended.reshape(-1, heads, head_dim)
    for chunk in plan.chunks:
        queries = q[chunk.start : chunk.end].transpose(0, 1)[None]  # [1, heads, Q, head_dim]
        if chunk.slots is None:
            keys, values = k[chunk.start : chunk.end], v[chunk.start : chunk.end]
        else:
            keys, values = recall(cache, chunk.slots, q.dtype)
        mask = chunk.full_mask if full else chunk.mask
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        if sinks is None:
            attended = F.scaled_dot_product_attention(
                *(queries, keys, values),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
        else:
            attended = _chunk_with_sinks(queries, keys, values, mask, scale, sinks)
        out[chunk.start : chunk.end] = attended[0].transpose(0, 1)
    return out


def _chunk_with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention [1, heads, Q, head_dim] of a chunk; k and v [1, kv_heads, S, head_dim]; mask [Q, S], None: causal."""
    heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    of_heads = sinks.view(kv_heads, -1, 1)
    step = max(1, MOST_SCORES // (heads * k.shape[2]))
    parts = []
    for start in range(0, length, step):
        some = q[:, :, start : start + step]
        grouped = some.reshape(1, kv_heads, -1, q.shape[3])  # [1, kv_heads, group * Q, head_dim]
        repeated = mask[start : start + step].repeat(heads // kv_heads, 1)
        part = _with_sinks(grouped, k, v, repeated, scale, of_heads.repeat_interleave(some.shape[2], 1))
        parts.append(part.view(some.shape))
    return torch.cat(parts, 2)


def _with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, sinks: torch.Tensor
) -> torch.Tensor:
    """Attention [B, kv_heads, R, head_dim] of rows q whose softmax has one more logit, sinks [kv_heads, R, 1].

    k and v [B, kv_heads, S, head_dim]; mask [..., S], True where a row may look. Xiao et al. 2023 (arXiv:2309.17453);
    as learned logits: OpenAI 2025 (arXiv:2508.10925). The softmax is taken in float32.
    """
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.float().expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weights.to(v.dtype) @ v
