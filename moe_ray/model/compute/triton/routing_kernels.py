"""Routing without the host: each token's experts and weights, its place among their rows, the sum of their answers."""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton
from moe_ray.model.compute.triton.numerics import narrowed, stepped


@triton.jit
def choose_kernel(
    logits: tl.tensor,
    correction: tl.tensor,
    real: tl.tensor,
    chosen: tl.tensor,
    weights: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    LEAST_SUM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A token a program: the experts of its TOP_K best scores, ascending, and their weights, as `moe.choose`.

    logits [T, EXPERTS], correction [EXPERTS]; chosen [T, TOP_K] int64, weights [T, TOP_K] float32. Of equal scores the
    expert with the lower number is chosen. Tokens from `real` [1] on are padding, and choose EXPERTS, which is none.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    here = expert < EXPERTS
    logit = tl.load(logits + token * EXPERTS + expert, mask=here, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), 1.0 + tl.exp(-logit))
    else:
        powers = tl.exp(logit - tl.max(logit, 0))
        scores = tl.div_rn(powers, tl.zeros([BLOCK], tl.float32) + tl.sum(powers, 0))
    ranked = scores
    if correction is not None:
        ranked += tl.load(correction + expert, mask=here, other=0.0).to(tl.float32)
    ranked = tl.where(ranked == ranked, ranked, float("inf"))  # what is no number is the largest, as to torch
    ranked = tl.where(here, ranked, float("-inf"))
    is_chosen = expert < 0
    for _ in tl.static_range(TOP_K):
        left = tl.where(is_chosen, float("-inf"), ranked)
        is_chosen = is_chosen | (expert == tl.argmax(left, 0, tie_break_left=True))
    if RENORMALISE:
        total = tl.sum(tl.where(is_chosen, scores, 0.0), 0) + LEAST_SUM
        scores = tl.div_rn(scores, tl.zeros([BLOCK], tl.float32) + total)
    scores *= SCALE
    place = token * TOP_K + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    number = expert.to(tl.int64)
    if real is not None:
        number = tl.where(token < tl.load(real), number, EXPERTS)
    tl.store(chosen + place, number, mask=is_chosen)
    tl.store(weights + place, scores, mask=is_chosen)


@triton.jit(do_not_specialize=["tokens"])
def rank_kernel(
    chosen: tl.tensor,
    ranks: tl.tensor,
    counts: tl.tensor,
    tokens: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """An expert a program: how many of the tokens before chose it, of each (token, k) that does, and how many in all.

    chosen, ranks [tokens, TOP_K]; counts [E]; int64. A token chooses an expert once at most.
    """
    expert = tl.program_id(0)
    before: tl.tensor = 0
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token < tokens
        chooses = token < 0
        for k in tl.static_range(TOP_K):
            chooses = chooses | (tl.load(chosen + token * TOP_K + k, mask=here, other=-1) == expert)
        rank = before + tl.cumsum(chooses.to(tl.int32), 0) - 1
        for k in tl.static_range(TOP_K):
            mine = tl.load(chosen + token * TOP_K + k, mask=here, other=-1) == expert
            tl.store(ranks + token * TOP_K + k, rank.to(tl.int64), mask=mine)
        before += tl.sum(chooses.to(tl.int32), 0)
    tl.store(counts + expert, before.to(tl.int64))


@triton.jit
def place_kernel(
    hidden: tl.tensor,
    chosen: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    row_weights: tl.tensor,
    row_of: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A (token, k) a program: copy the token's row of hidden [T, WIDTH] to its place among rows [T * K, WIDTH].

    Padding, whose expert is EXPERTS, comes behind all tokens here and there: its rows stay where they are.
    """
    pair = tl.program_id(0).to(tl.int64)
    mine = tl.load(chosen + pair)
    expert = tl.arange(0, BLOCK_E)
    before = tl.sum(tl.load(counts + expert, mask=(expert < mine) & (expert < EXPERTS), other=0), 0)
    place = pair
    if mine < EXPERTS:
        place = before + tl.load(ranks + pair)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < WIDTH
    tl.store(rows + place * WIDTH + at, tl.load(hidden + pair // TOP_K * WIDTH + at, mask=here), mask=here)
    if tl.program_id(1) == 0:
        tl.store(row_of + pair, place)
        tl.store(row_weights + place, tl.load(weights + pair))


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    hidden: tl.tensor,
    rows: tl.tensor,
    row_of: tl.tensor,
    real: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """sums [P, WIDTH] = hidden + MULTIPLIER * the rows [T * K, WIDTH] of each token by row_of [T, K], in its order.

    Rounds after each operation, as `moe.combine` does. Tokens from T on, or from `real` [1] on, which are padding, stay
    as they are.
    """
    DTYPE: tl.constexpr = sums.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < WIDTH
    x = tl.load(hidden + token * WIDTH + at, mask=here, other=0.0).to(tl.float32)
    last = tokens
    if real is not None:
        last = tl.minimum(tokens, tl.load(real).to(tl.int32))
    if token < last:
        made = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(TOP_K):
            row = tl.load(row_of + token * TOP_K + k)
            more = tl.load(rows + row * WIDTH + at, mask=here, other=0.0).to(tl.float32)
            if k == 0:
                made = more
            else:
                made = stepped(made + more, DTYPE, EMULATED)
        x = stepped(x + stepped(made * MULTIPLIER, DTYPE, EMULATED), DTYPE, EMULATED)
    tl.store(sums + token * WIDTH + at, narrowed(x, DTYPE, EMULATED), mask=here)
