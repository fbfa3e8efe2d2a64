"""Products of rows with tiled weights: the kernels. `products.py` launches them.

Outputs lie on the M side of the tensor cores' products and token rows on the N side, where 8 rows are enough for one
instruction: so few rows waste little, and weights come to the tensor cores from the registers that they are decoded in.

A row's sum is taken in one order: over blocks of inputs from first to last, in as many parts as the weight's shape
says, the parts added from first to last. A product is always one of `ROWS` rows, of which those that are not there are
0; a program that computes more takes several such products of each tile of weights, which it reads and widens once. So
instructions are the same for every count of rows, and a row has the same bits alone and in any company. What is rounded
once and what twice is written out (`tl.fma`), and not left to the compiler.

Codes are multiplied as whole numbers (exact in 16 bits) and each sum over a group is multiplied by its scale in
float32: weights are what their codes say, but for scales of 11 bits. Floats of 8 bits are exact in 16 bits as well,
and their scales have 24.
"""

from __future__ import annotations

from moe_ray.model.compute.triton.launch import tl, triton


@triton.jit
def _rows_of(
    x: tl.tensor,
    order: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    k: tl.tensor,
    K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Inputs [STEP, ROWS] of the rows; 0 where there are none."""
    inside = k < K
    column = k
    if order is not None:
        column = tl.load(order + k, mask=inside, other=0)
    part = tl.load(x + row[None, :] * K + column[:, None], mask=inside[:, None] & (row < count)[None, :], other=0.0)
    if WIDEN:
        part = part.to(tl.float32)
    return part


@triton.jit
def _held(codes: tl.tensor, tile: tl.tensor, block: tl.tensor, TILE: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    """A tile of memory [TILE, STEP], `tile` being that of outputs times their blocks."""
    at = (tile + block) * (TILE * STEP)
    return tl.load(codes + at + tl.arange(0, TILE)[:, None] * STEP + tl.arange(0, STEP)[None, :])


@triton.jit
def _factor(
    held: tl.tensor,
    levels: tl.tensor,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Weights [TILE, STEP] of a half of a tile of memory, as they are multiplied, in DTYPE."""
    if BITS == 4:
        code = (held >> (4 * HALF)) & 15
        if levels is not None:
            # Levels of 16 bits are too small for Triton to load them ahead, which is well: that takes longer than they
            # do. But behind such a load it sees no other to load ahead; the 0 of a code's upper bits leads it there.
            factor = tl.load(levels + code.to(tl.int32)).to(DTYPE) + (code >> 4).to(DTYPE)
        else:
            factor = (code.to(tl.int8) - 8).to(DTYPE)
    elif MANTISSA > 0:
        wide = held.to(tl.uint16)  # by operations that every card has: see `tiles.WIDENED`
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << (10 - MANTISSA))
        factor = half.to(tl.float16, bitcast=True).to(DTYPE)
    else:
        factor = held.to(DTYPE)
    return factor


@triton.jit
def _of_group(values: tl.tensor, group: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Scales or offsets [TILE, 1] of a group, in float32; None where there are none."""
    if values is None:
        found = None
    else:
        found = tl.load(values + group * TILE + tl.arange(0, TILE)).to(tl.float32)[:, None]
    return found


@triton.jit
def _add(
    totals: tl.tuple,  # of [TILE, ROWS]
    factor: tl.tensor,  # [TILE, STEP]
    inputs: tl.tuple,  # of [STEP, ROWS]
    scale: tl.tensor,  # [TILE, 1]
    offset: tl.tensor,  # [TILE, 1]
    ROW_BLOCKS: tl.constexpr,
) -> tl.tuple:
    """The sums of each block of rows, and the product of weights with its inputs."""
    more = ()
    for b in tl.static_range(ROW_BLOCKS):
        total = totals[b]
        if scale is None:
            total = tl.dot(factor, inputs[b], total, input_precision="ieee")
        else:
            made = tl.dot(factor, inputs[b], input_precision="ieee")
            total = tl.fma(made, scale.broadcast_to(total.shape), total)
        if offset is not None:
            sums = tl.sum(inputs[b].to(tl.float32), 0)[None, :]
            total = tl.fma(sums.broadcast_to(total.shape), offset.broadcast_to(total.shape), total)
        more += (total,)  # type: ignore[assignment]
    return more


@triton.jit
def _zeros(TILE: tl.constexpr, ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr) -> tl.tuple:
    """Sums of each block of rows, before anything is added."""
    totals = ()
    for _ in tl.static_range(ROW_BLOCKS):
        totals += (tl.zeros((TILE, ROWS), tl.float32),)  # type: ignore[assignment]
    return totals


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
    ROW_BLOCKS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """What an expert makes of its rows before `down`: act(gate) * up, or the clamped SwiGLU of `ClampedSwiGLU`.

    `extra` is added to gate and up before: what adapters add.
    """
    first = tl.program_id(0).to(tl.int64) * (ROW_BLOCKS * ROWS) + tl.arange(0, ROWS)
    tile = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = tl.float32 if WIDEN else x.dtype.element_ty
    gates = _zeros(TILE, ROWS, ROW_BLOCKS)
    ups = _zeros(TILE, ROWS, ROW_BLOCKS)
    for block in range(BLOCKS):
        held_gate = _held(codes, 2 * tile * BLOCKS, block, TILE, STEP)
        held_up = _held(codes, (2 * tile + 1) * BLOCKS, block, TILE, STEP)
        for half in tl.static_range(HALVES):
            start = (block * HALVES + half) * STEP
            group = 2 * tile * GROUPS
            if GROUPS > 1:
                group += tl.minimum(start // GROUP, GROUPS - 1)  # behind the last input all inputs are 0
            parts = ()
            for b in tl.static_range(ROW_BLOCKS):
                parts += (_rows_of(x, order, first + b * ROWS, count, start + tl.arange(0, STEP), K, WIDEN),)  # type: ignore[assignment]
            gates = _add(
                gates,
                _factor(held_gate, levels, half, BITS, MANTISSA, dtype),
                parts,
                _of_group(scales, group, TILE),
                _of_group(offsets, group, TILE),
                ROW_BLOCKS,
            )
            ups = _add(
                ups,
                _factor(held_up, levels, half, BITS, MANTISSA, dtype),
                parts,
                _of_group(scales, group + GROUPS, TILE),
                _of_group(offsets, group + GROUPS, TILE),
                ROW_BLOCKS,
            )
    n = tile * TILE + tl.arange(0, TILE)
    inside = n < N
    for b in tl.static_range(ROW_BLOCKS):
        row = first + b * ROWS
        gate = gates[b]
        up = ups[b]
        if multiplier is not None:
            gate *= tl.load(multiplier)
            up *= tl.load(multiplier + 1)
        if bias is not None:
            gate += tl.load(bias + n, mask=inside, other=0.0)[:, None]
            up += tl.load(bias + N + n, mask=inside, other=0.0)[:, None]
        both = inside[:, None] & (row < count)[None, :]
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
    ROW_BLOCKS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """x W^T, in parts: part p is the sum over blocks of inputs from p * PER_PART on."""
    first = tl.program_id(0).to(tl.int64) * (ROW_BLOCKS * ROWS) + tl.arange(0, ROWS)
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    dtype: tl.constexpr = tl.float32 if WIDEN else x.dtype.element_ty
    totals = _zeros(TILE, ROWS, ROW_BLOCKS)
    for block in range(part * PER_PART, tl.minimum(part * PER_PART + PER_PART, BLOCKS)):
        held = _held(codes, tile * BLOCKS, block, TILE, STEP)
        for half in tl.static_range(HALVES):
            start = (block * HALVES + half) * STEP
            group = tile * GROUPS
            if GROUPS > 1:
                group += tl.minimum(start // GROUP, GROUPS - 1)
            inputs = ()
            for b in tl.static_range(ROW_BLOCKS):
                inputs += (_rows_of(x, order, first + b * ROWS, count, start + tl.arange(0, STEP), K, WIDEN),)  # type: ignore[assignment]
            totals = _add(
                totals,
                _factor(held, levels, half, BITS, MANTISSA, dtype),
                inputs,
                _of_group(scales, group, TILE),
                _of_group(offsets, group, TILE),
                ROW_BLOCKS,
            )
    n = tile * TILE + tl.arange(0, TILE)
    for b in tl.static_range(ROW_BLOCKS):
        row = first + b * ROWS
        total = totals[b]
        if multiplier is not None:
            total *= tl.load(multiplier)
        at = (part.to(tl.int64) * count + row[None, :]) * N + n[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (row < count)[None, :])


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
