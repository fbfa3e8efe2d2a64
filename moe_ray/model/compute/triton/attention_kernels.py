"""Attention over the paged cache, for decodes and chunks alike: a tile of query rows, keys and values as they are held.

Softmax is taken within partitions of the context, whose bounds are the same for all tokens, and partitions are merged
in their order. Decodes and chunks have tiles of one shape. So what a token attends to is the same bits alone, in a
batch, as a decode and in a chunk. Softmax in passes: Milakov & Gimelshein 2018 (arXiv:1805.02867); partitions side by
side: Dao et al. 2023, "Flash-Decoding".
"""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton
from moe_ray.model.compute.triton.numerics import from_float8, narrowed, product


@triton.jit
def held(
    rows: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    here: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    EMULATED: tl.constexpr,
) -> tl.tensor:
    """Rows of the cache [KEYS, BLOCK_D] in DTYPE, as `recall` of torch/kv_rows.py; zeros where not `here` [KEYS]."""
    d = tl.arange(0, BLOCK_D)
    found = tl.load(rows + row[:, None] * HEAD_DIM + d[None, :], mask=here[:, None] & (d[None, :] < HEAD_DIM), other=0)
    if KIND == "int8":
        scale = tl.load(scales + row, mask=here, other=0.0)
        result = narrowed(found.to(tl.float32) * scale[:, None], DTYPE, EMULATED)
    elif KIND == "float8":
        result = narrowed(from_float8(found), DTYPE, EMULATED)
    else:
        result = found
    return result


@triton.jit
def merged(
    peak: tl.tensor, total: tl.tensor, acc: tl.tensor, peak2: tl.tensor, total2: tl.tensor, acc2: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Two parts of a softmax as one: peaks and sums [R], weighted values [R, D]. One that saw nothing changes none."""
    new = tl.maximum(peak, peak2)
    base = tl.where(new == float("-inf"), 0.0, new)
    old, more = tl.exp2(peak - base), tl.exp2(peak2 - base)
    return new, total * old + total2 * more, acc * old[:, None] + acc2 * more[:, None]


@triton.jit
def begun(sinks: tl.tensor, head: tl.tensor, here: tl.tensor, ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Peaks and sums [ROWS] before any partition: a sink counts in a softmax, and has no value."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        peak = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    return peak, total


@triton.jit(do_not_specialize=["table_stride"])
def attend_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    tables: tl.tensor,
    tiles: tl.tensor,
    positions: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    table_stride: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTITION: tl.constexpr,
    APART: tl.constexpr,
    KIND: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """A tile of tokens of one sequence and one KV head a program; out [P, KV_HEADS * GROUP, HEAD_DIM].

    tiles [tiles, 4]: the row of `tables` [sequences, blocks]; the flat range of tokens, of which ROWS / GROUP_ROWS fit
    a tile; where it begins in `parts`. positions [P]. SCALE of products, in base 2; WINDOW 0: a token sees all. APART:
    each program takes one partition, the third of its grid's dimensions, and writes what `merge_kernel` merges.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    HEADS: tl.constexpr = KV_HEADS * GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    table = tables + tl.load(tiles + 4 * tile) * table_stride
    start = tl.load(tiles + 4 * tile + 1).to(tl.int32)
    r = tl.arange(0, ROWS)
    token = start + r // GROUP_ROWS
    head = kv_head * GROUP + r % GROUP_ROWS
    here = (token < tl.load(tiles + 4 * tile + 2)) & (r % GROUP_ROWS < GROUP)
    position = tl.load(positions + token, mask=here, other=-1).to(tl.int32)
    newest = tl.max(position, 0)
    earliest = 0
    if WINDOW > 0:
        earliest = tl.maximum(tl.min(tl.where(here, position, newest), 0) + 1 - WINDOW, 0)
    first = earliest // PARTITION
    end = newest // PARTITION + 1
    if APART:
        first = tl.maximum(first, tl.program_id(2))
        end = tl.minimum(end, tl.program_id(2) + 1)
    d = tl.arange(0, BLOCK_D)
    of_row = (token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    is_value = here[:, None] & (d[None, :] < HEAD_DIM)
    queries = tl.load(q + of_row, mask=is_value, other=0.0)
    peak, total = begun(sinks, head, here, ROWS)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for partition in range(first, end):
        part_peak = tl.full([ROWS], float("-inf"), tl.float32)
        part_total = tl.zeros([ROWS], tl.float32)
        part_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        # Keys that no row of the tile sees are passed over: they would change nothing.
        begin = tl.maximum(partition * PARTITION, earliest // KEYS * KEYS)
        limit = tl.minimum((partition + 1) * PARTITION, newest + 1)
        for at in range(begin, limit, KEYS):
            key = at + tl.arange(0, KEYS)
            is_key = key < limit
            block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0)
            row = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
            k = held(keys, k_scales, row, is_key, HEAD_DIM, BLOCK_D, KIND, DTYPE, EMULATED)
            products = product(queries, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), EMULATED)
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, products * SCALE, float("-inf"))
            new = tl.maximum(part_peak, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            old = tl.exp2(part_peak - base)
            weights = tl.exp2(scores - base[:, None])
            v = held(values, v_scales, row, is_key, HEAD_DIM, BLOCK_D, KIND, DTYPE, EMULATED)
            part_total = part_total * old + tl.sum(weights, 1)
            part_acc = product(narrowed(weights, DTYPE, EMULATED), v, part_acc * old[:, None], EMULATED)
            part_peak = new
        if APART:
            count = tl.num_programs(2)
            to = ((tl.load(tiles + 4 * tile + 3) + token - start) * count + partition) * HEADS + head
            tl.store(parts + to[:, None] * HEAD_DIM + d[None, :], part_acc, mask=is_value)
            tl.store(peaks + to, part_peak, mask=here)
            tl.store(totals + to, part_total, mask=here)
        else:
            peak, total, acc = merged(peak, total, acc, part_peak, part_total, part_acc)
    if not APART:
        result = tl.div_rn(acc, tl.where(here, total, 1.0)[:, None])
        tl.store(out + of_row, narrowed(result, DTYPE, EMULATED), mask=is_value)


@triton.jit(do_not_specialize=["partitions"])
def merge_kernel(
    parts: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    partitions: tl.tensor,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTITION: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """Merge the partitions that `attend_kernel` took apart; one of `tokens` [N] and a KV head a program.

    parts [N, partitions, heads, HEAD_DIM], peaks and totals [N, partitions, heads], float32; out [P, heads, HEAD_DIM].
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, GROUP_ROWS)
    head = tl.program_id(1) * GROUP + r
    here = r < GROUP
    token = tl.load(tokens + row)
    position = tl.load(positions + token).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0) // PARTITION
    d = tl.arange(0, BLOCK_D)
    is_value = here[:, None] & (d[None, :] < HEAD_DIM)
    peak, total = begun(sinks, head, here, GROUP_ROWS)
    acc = tl.zeros([GROUP_ROWS, BLOCK_D], tl.float32)
    for partition in range(first, position // PARTITION + 1):
        of = (row * partitions + partition) * HEADS + head
        part_acc = tl.load(parts + of[:, None] * HEAD_DIM + d[None, :], mask=is_value, other=0.0)
        part_peak = tl.load(peaks + of, mask=here, other=0.0)
        part_total = tl.load(totals + of, mask=here, other=0.0)
        peak, total, acc = merged(peak, total, acc, part_peak, part_total, part_acc)
    to = (token * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    result = tl.div_rn(acc, tl.where(here, total, 1.0)[:, None])
    tl.store(out + to, narrowed(result, out.dtype.element_ty, EMULATED), mask=is_value)
