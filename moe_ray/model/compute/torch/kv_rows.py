"""Keys and values on their way into the KV cache and out of it: as they are, as floats of 8 bits, or as scaled int8."""

from __future__ import annotations

from typing import Final

import torch

from moe_ray.model.compute.base import LayerCache

MOST: Final = 127
"""Largest magnitude of what is held in int8."""
MOST_FLOAT8: Final = 448.0
"""Of float8_e4m3fn."""


def keep(cache: LayerCache, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write k and v [P, kv_heads, head_dim] to `slots` [P]; return them as they will be read from there."""
    if v is k:
        kept = _keep(cache.k, cache.k_scales, slots, k)
        return kept, kept
    return _keep(cache.k, cache.k_scales, slots, k), _keep(cache.v, cache.v_scales, slots, v)


def recall(cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of `slots` [...], each [..., kv_heads, head_dim]."""
    return _recall(cache.k, cache.k_scales, slots, dtype), _recall(cache.v, cache.v_scales, slots, dtype)


def _keep(held: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if held.dtype == torch.float8_e4m3fn:
        floats = to_float8(rows)
        # By their bytes: few operations know this dtype.
        held.view(torch.uint8).index_copy_(0, slots, floats.view(torch.uint8))
        return floats.to(rows.dtype)
    if scales is None:
        held.index_copy_(0, slots, rows)
        return rows
    codes, scale = rounded(rows)
    held.index_copy_(0, slots, codes)
    scales.index_copy_(0, slots, scale)
    return _values(codes, scale, rows.dtype)


def _recall(held: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if held.dtype == torch.float8_e4m3fn:
        return held.view(torch.uint8)[slots].view(held.dtype).to(dtype)
    return held[slots] if scales is None else _values(held[slots], scales[slots], dtype)


def to_float8(rows: torch.Tensor) -> torch.Tensor:
    """rows [...] as float8_e4m3fn, rounded to nearest even, at most 448; NaN where a number is NaN or infinite."""
    wide = rows.float()
    within = wide.clamp(-MOST_FLOAT8, MOST_FLOAT8)  # the conversion alone makes NaN of what is above
    return within.masked_fill(~wide.isfinite(), torch.nan).to(torch.float8_e4m3fn)


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [..., head_dim] as int8, and what one of these is worth, float32 [...]: the largest magnitude over 127.

    The scale is NaN where a number is NaN or infinite: so are its values.
    """
    wide = rows.float()
    peak = wide.abs().amax(-1)
    scale = (peak / MOST).masked_fill(~peak.isfinite(), torch.nan)
    factor = (MOST / peak).masked_fill(~(peak > 1e-30) | ~peak.isfinite(), 0.0)
    codes = (wide * factor[..., None]).nan_to_num(0.0).round().clamp(-MOST, MOST)
    return codes.to(torch.int8), scale


def _values(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes * scale[..., None]).to(dtype)
