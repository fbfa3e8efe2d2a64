"""Norms of rows by their root mean square, with what is added to the rows before."""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton
from moe_ray.model.compute.triton.numerics import narrowed, stepped


@triton.jit
def add_norm_kernel(
    hidden: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    sums: tl.tensor,
    normed: tl.tensor,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """A row of hidden [P, WIDTH] a program: sums = hidden + added * MULTIPLIER; normed = `rms_norm` of these.

    Without `added`, `sums` are not written. Rounds after each operation, as the reference does (layers.py).
    """
    DTYPE: tl.constexpr = normed.dtype.element_ty
    at = tl.arange(0, BLOCK)
    here = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    x = tl.load(hidden + row + at, mask=here, other=0.0).to(tl.float32)
    if added is not None:
        more = tl.load(added + row + at, mask=here, other=0.0).to(tl.float32)
        x = stepped(x + stepped(more * MULTIPLIER, DTYPE, EMULATED), DTYPE, EMULATED)
        tl.store(sums + row + at, narrowed(x, DTYPE, EMULATED), mask=here)
    root = tl.sqrt_rn(tl.sum(x * x, 0) / WIDTH + EPS)
    unit = stepped(tl.div_rn(x, root), DTYPE, EMULATED)
    by = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + row + at, narrowed(by * unit, DTYPE, EMULATED), mask=here)


@triton.jit(do_not_specialize=["stride"])
def head_norm_kernel(
    qk: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    normed: tl.tensor,
    stride: tl.tensor,
    HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """A head of qk [P, ALL_HEADS, HEAD_DIM] a program: its `rms_norm`, by q_norm for the first HEADS, else by k_norm.

    Tokens of qk are `stride` apart; normed [P, ALL_HEADS, HEAD_DIM].
    """
    DTYPE: tl.constexpr = normed.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    here = at < HEAD_DIM
    x = tl.load(qk + token * stride + head * HEAD_DIM + at, mask=here, other=0.0).to(tl.float32)
    root = tl.sqrt_rn(tl.sum(x * x, 0) / HEAD_DIM + EPS)
    unit = stepped(tl.div_rn(x, root), DTYPE, EMULATED)
    if head < HEADS:
        by = tl.load(q_norm + at, mask=here, other=0.0).to(tl.float32)
    else:
        by = tl.load(k_norm + at, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + (token * ALL_HEADS + head) * HEAD_DIM + at, narrowed(by * unit, DTYPE, EMULATED), mask=here)
