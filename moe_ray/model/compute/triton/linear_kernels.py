"""Products of token rows and weights. Outputs lie on the M side of tensor cores' tiles, tokens on the N side.

The N side may be 8 tokens wide or 128 with one and the same instruction, and each output's sum goes through its inputs
in one order. So what a row gives does not depend on how many rows there are, which libraries do not promise.
"""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton
from moe_ray.model.compute.triton.numerics import narrowed, product


@triton.jit(do_not_specialize=["rows", "stride"])
def linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """out [rows, OUTPUTS] = x [rows, INPUTS] weight^T + bias; rows of x are `stride` apart.

    The sum is taken in SPLITS parts, which are added in their order. APART: each program takes one part, the third of
    its grid's dimensions, and writes it to `parts` [SPLITS, rows, OUTPUTS] float32, for `added_kernel`.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    PER_SPLIT: tl.constexpr = ((INPUTS + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)) * BLOCK_K
    weights = weight + n.to(tl.int64)[:, None] * INPUTS
    tokens = x + t.to(tl.int64)[None, :] * stride
    is_output = n[:, None] < OUTPUTS
    is_token = t[None, :] < rows
    first = 0
    end = SPLITS
    if APART:
        first = tl.program_id(2)
        end = first + 1
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for split in range(first, end):
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for start in range(0, PER_SPLIT, BLOCK_K):
            k = split * PER_SPLIT + start + tl.arange(0, BLOCK_K)
            w = tl.load(weights + k[None, :], mask=is_output & (k[None, :] < INPUTS), other=0.0)
            xs = tl.load(tokens + k[:, None], mask=is_token & (k[:, None] < INPUTS), other=0.0)
            acc = product(w, xs, acc, EMULATED)
        total += acc
    at = t.to(tl.int64)[None, :] * OUTPUTS + n[:, None]
    if APART:
        share = rows.to(tl.int64) * OUTPUTS
        tl.store(parts + first * share + at, total, mask=is_output & is_token)
    else:
        if bias is not None:
            total += tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, narrowed(total, out.dtype.element_ty, EMULATED), mask=is_output & is_token)


@triton.jit(do_not_specialize=["rows"])
def added_kernel(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """out [rows, OUTPUTS] = the sum of parts [SPLITS, rows, OUTPUTS] in order, as `linear_kernel` adds, + bias."""
    count = rows.to(tl.int64) * OUTPUTS
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + at, mask=here, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % OUTPUTS, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, narrowed(total, out.dtype.element_ty, EMULATED), mask=here)
