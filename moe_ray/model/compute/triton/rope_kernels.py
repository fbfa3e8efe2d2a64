"""Rotary embeddings of queries and keys, and keys and values on their way into the paged cache."""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton
from moe_ray.model.compute.triton.numerics import narrowed, stepped, to_float8, whole


@triton.jit
def rotated(
    x: tl.tensor, other: tl.tensor, cos: tl.tensor, sin: tl.tensor, DTYPE: tl.constexpr, EMULATED: tl.constexpr
) -> tl.tensor:
    """x cos + other sin, float32, rounded to DTYPE where the reference rounds (`apply_rope`)."""
    first = stepped(x * cos, DTYPE, EMULATED)
    return stepped(first + stepped(other * sin, DTYPE, EMULATED), DTYPE, EMULATED)


@triton.jit
def halves(
    rows: tl.tensor, BLOCK_H: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of heads that lie one after the other at `rows`, float32 [BLOCK_H, BLOCK]; 0 beyond them."""
    head, at = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)[None, :]
    here = (head < HEADS) & (at < HALF)
    low = tl.load(rows + head * (2 * HALF) + at, mask=here, other=0.0).to(tl.float32)
    high = tl.load(rows + head * (2 * HALF) + HALF + at, mask=here, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def kept(
    rows: tl.tensor,
    scales: tl.tensor,
    slot: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    BLOCK_H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    KIND: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """Write the halves of a token's heads, float32, to the cache, as `keep` of torch/kv_rows.py holds them."""
    head, at = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK)[None, :]
    here = (head[:, None] < HEADS) & (at < HALF)
    row = slot * HEADS + head
    to = rows + row[:, None] * (2 * HALF) + at
    if KIND == "int8":
        peak = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
        strange = tl.sum(((low != low) | (high != high)).to(tl.int32), 1)  # maxima pass over what is no number
        finite = (peak < float("inf")) & (strange == 0)
        scale = tl.where(finite, tl.div_rn(peak, tl.full([BLOCK_H], 127.0, tl.float32)), float("nan"))
        factor = tl.div_rn(tl.full([BLOCK_H], 1.0, tl.float32), tl.maximum(peak, 1e-30)) * 127.0  # as torch divides
        factor = tl.where(finite & (peak > 1e-30), factor, 0.0)[:, None]
        tl.store(scales + row, scale, mask=head < HEADS)
        codes = whole(tl.where(finite[:, None], low, 0.0) * factor)
        tl.store(to, tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), mask=here)
        codes = whole(tl.where(finite[:, None], high, 0.0) * factor)
        tl.store(to + HALF, tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), mask=here)
    elif KIND == "float8":
        tl.store(to, to_float8(low), mask=here)
        tl.store(to + HALF, to_float8(high), mask=here)
    else:
        tl.store(to, narrowed(low, rows.dtype.element_ty, EMULATED), mask=here)
        tl.store(to + HALF, narrowed(high, rows.dtype.element_ty, EMULATED), mask=here)


@triton.jit(do_not_specialize=["qk_stride", "v_stride"])
def rope_kernel(
    qk: tl.tensor,
    v: tl.tensor,
    cos_sin: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    qk_stride: tl.tensor,
    v_stride: tl.tensor,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """A token a program: rotate its queries into q [P, HEADS, 2 HALF], its keys into the cache, beside its values.

    qk [P, HEADS + KV_HEADS, 2 HALF] and v [P, KV_HEADS, 2 HALF], tokens `qk_stride` and `v_stride` apart;
    cos_sin [P, 2, 2 HALF]; slots [P]. keys and values [slots, KV_HEADS, 2 HALF], scales [slots, KV_HEADS].
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    cos_low, cos_high = halves(cos_sin + token * (4 * HALF), 1, 1, BLOCK, HALF)
    sin_low, sin_high = halves(cos_sin + token * (4 * HALF) + 2 * HALF, 1, 1, BLOCK, HALF)
    low, high = halves(qk + token * qk_stride, BLOCK_H, HEADS, BLOCK, HALF)
    head = tl.arange(0, BLOCK_H)[:, None]
    here = (head < HEADS) & (at < HALF)
    to = q + (token * HEADS + head) * (2 * HALF) + at
    new = rotated(low, -high, cos_low, sin_low, DTYPE, EMULATED)
    tl.store(to, narrowed(new, DTYPE, EMULATED), mask=here)
    new = rotated(high, low, cos_high, sin_high, DTYPE, EMULATED)
    tl.store(to + HALF, narrowed(new, DTYPE, EMULATED), mask=here)
    slot = tl.load(slots + token)
    low, high = halves(qk + token * qk_stride + HEADS * (2 * HALF), BLOCK_KV, KV_HEADS, BLOCK, HALF)
    new_low = rotated(low, -high, cos_low, sin_low, DTYPE, EMULATED)
    new_high = rotated(high, low, cos_high, sin_high, DTYPE, EMULATED)
    kept(keys, k_scales, slot, new_low, new_high, BLOCK_KV, KV_HEADS, BLOCK, HALF, KIND, EMULATED)
    low, high = halves(v + token * v_stride, BLOCK_KV, KV_HEADS, BLOCK, HALF)
    kept(values, v_scales, slot, low, high, BLOCK_KV, KV_HEADS, BLOCK, HALF, KIND, EMULATED)
