"""Products of rows with tiled weights: the kernels. `products.py` launches them.

Outputs lie on the M side of the tensor cores' products and token rows on the N side, where 8 rows are enough for one
instruction: so few rows waste little, and weights come to the tensor cores from the registers that they are decoded in.

A row's sum is taken in one order: over blocks of inputs from first to last, in as many parts as the weight's shape
says, the parts added from first to last. Every program computes `ROWS` rows, more rows are more programs, and rows that
are not there are 0. So a row has the same bits alone and in any company.

Codes are multiplied as whole numbers (exact in 16 bits) and each sum over a group is multiplied by its scale in
float32: weights are what their codes say, but for scales of 11 bits. Floats of 8 bits are exact in 16 bits as well,
and their scales have 24.
"""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton


@triton.jit
def _rows_of(
    x: tl.tensor, order: tl.tensor, row: tl.tensor, there: tl.tensor, k: tl.tensor, K: tl.constexpr
) -> tl.tensor:
    """Inputs [step, ROWS] of the rows."""
    inside = k < K
    column = k
    if order is not None:
        column = tl.load(order + k, mask=inside, other=0)
    return tl.load(x + row[None, :] * K + column[:, None], mask=inside[:, None] & there[None, :], other=0.0)


@triton.jit
def _held(codes: tl.tensor, tile: tl.tensor, block: tl.tensor, TILE: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    """A tile of memory [TILE, STEP], `tile` being that of outputs times their blocks."""
    at = (tile + block) * (TILE * STEP)
    return tl.load(codes + at + tl.arange(0, TILE)[:, None] * STEP + tl.arange(0, STEP)[None, :])


@triton.jit
def _float8(bits: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """float16 of floats of 8 bits given as uint8, exact, by operations that every card has: see `tiles.WIDENED`."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << (10 - MANTISSA))).to(tl.float16, bitcast=True)


@triton.jit
def _add(
    total: tl.tensor,  # [TILE, ROWS]
    held: tl.tensor,  # [TILE, STEP]
    x: tl.tensor,  # [STEP, ROWS]
    scales: tl.tensor,
    offsets: tl.tensor,
    levels: tl.tensor,
    group: tl.tensor,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """`total` and the product of a half of a tile with its inputs. `group`: of the scales, tile of outputs included."""
    if WIDEN:
        x = x.to(tl.float32)
    if BITS == 4:
        code = (held >> (4 * HALF)) & 15
        if levels is not None:
            # Levels of 16 bits are too small for Triton to load them ahead, which is well: that takes longer than they
            # do. But behind such a load it sees no other to load ahead; the 0 of a code's upper bits leads it there.
            factor = tl.load(levels + code.to(tl.int32)).to(x.dtype) + (code >> 4).to(x.dtype)
        else:
            factor = (code.to(tl.int8) - 8).to(x.dtype)
    elif MANTISSA > 0:
        factor = _float8(held, MANTISSA).to(x.dtype)
    else:
        factor = held.to(x.dtype)
    if scales is None:
        total = tl.dot(factor, x, total, input_precision="ieee")
    else:
        at = group * TILE + tl.arange(0, TILE)
        total += tl.dot(factor, x, input_precision="ieee") * tl.load(scales + at).to(tl.float32)[:, None]
    if offsets is not None:
        at = group * TILE + tl.arange(0, TILE)
        total += tl.load(offsets + at).to(tl.float32)[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
    return total


@triton.jit(do_not_specialize=["count"])
def gate_up_kernel(
    x: tl.tensor,  # [count, K]
    order: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    levels: tl.tensor,
    multiplier: tl.tensor,
    bias: tl.tensor,  # float32 [2 N]
    extra: tl.tensor,  # float32 [count, 2 N]
    out: tl.tensor,  # [count, N]
    count: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """What an expert makes of its rows before `down`: act(gate) * up, or the clamped SwiGLU of `ClampedSwiGLU`.

    `extra` is added to gate and up before: what adapters add.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < count
    tile = tl.program_id(1).to(tl.int64)
    gate = tl.zeros((TILE, ROWS), tl.float32)
    up = tl.zeros((TILE, ROWS), tl.float32)
    for block in range(BLOCKS):
        of_gate = _held(codes, 2 * tile * BLOCKS, block, TILE, STEP)
        of_up = _held(codes, (2 * tile + 1) * BLOCKS, block, TILE, STEP)
        for half in tl.static_range(HALVES):
            start = (block * HALVES + half) * STEP
            part = _rows_of(x, order, row, there, start + tl.arange(0, STEP), K)
            group = 2 * tile * GROUPS
            if GROUPS > 1:
                group += tl.minimum(start // GROUP, GROUPS - 1)  # behind the last input all inputs are 0
            gate = _add(gate, of_gate, part, scales, offsets, levels, group, half, BITS, MANTISSA, TILE, WIDEN)
            up = _add(up, of_up, part, scales, offsets, levels, group + GROUPS, half, BITS, MANTISSA, TILE, WIDEN)
    if multiplier is not None:
        gate *= tl.load(multiplier)
        up *= tl.load(multiplier + 1)
    n = tile * TILE + tl.arange(0, TILE)
    inside = n < N
    if bias is not None:
        gate += tl.load(bias + n, mask=inside, other=0.0)[:, None]
        up += tl.load(bias + N + n, mask=inside, other=0.0)[:, None]
    both = inside[:, None] & there[None, :]
    if extra is not None:
        at = row[None, :] * (2 * N) + n[:, None]
        gate += tl.load(extra + at, mask=both, other=0.0)
        up += tl.load(extra + at + N, mask=both, other=0.0)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        inner = gate * tl.sigmoid(gate * ALPHA) * (up + 1)
    else:
        inner = gate * tl.sigmoid(gate) * up
    tl.store(out + row[None, :] * N + n[:, None], inner.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["count"])
def product_kernel(
    x: tl.tensor,  # [count, K]
    order: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    levels: tl.tensor,
    multiplier: tl.tensor,
    out: tl.tensor,  # [parts, count, N]
    count: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_PART: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """x W^T, in parts: part p is the sum over blocks of inputs from p * PER_PART on."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < count
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    total = tl.zeros((TILE, ROWS), tl.float32)
    for block in range(part * PER_PART, tl.minimum(part * PER_PART + PER_PART, BLOCKS)):
        held = _held(codes, tile * BLOCKS, block, TILE, STEP)
        for half in tl.static_range(HALVES):
            start = (block * HALVES + half) * STEP
            inputs = _rows_of(x, order, row, there, start + tl.arange(0, STEP), K)
            group = tile * GROUPS
            if GROUPS > 1:
                group += tl.minimum(start // GROUP, GROUPS - 1)
            total = _add(total, held, inputs, scales, offsets, levels, group, half, BITS, MANTISSA, TILE, WIDEN)
    if multiplier is not None:
        total *= tl.load(multiplier)
    n = tile * TILE + tl.arange(0, TILE)
    at = (part.to(tl.int64) * count + row[None, :]) * N + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    parts: tl.tensor,  # float32 [PARTS, count, N]
    bias: tl.tensor,  # [N]
    extra: tl.tensor,  # float32 [count, N]
    weights: tl.tensor,  # [count]
    out: tl.tensor,  # [count, N]
    count: tl.tensor,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The parts of a product added from first to last, with bias and `extra`, times the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = n < N
    total = tl.load(parts + row * N + n, mask=inside, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(parts + (part * count.to(tl.int64) + row) * N + n, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if extra is not None:
        total += tl.load(extra + row * N + n, mask=inside, other=0.0)
    if weights is not None:
        total *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=inside)
