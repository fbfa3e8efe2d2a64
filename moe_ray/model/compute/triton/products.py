"""Launches of the kernels of products: plain sizes in, a description of each launch out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from moe_ray.model.compute.triton.launch import INTERPRETED, Constant, Launch
from moe_ray.model.compute.triton.product_kernels import finish_kernel, gate_up_kernel, product_kernel
from moe_ray.model.compute.triton.tiles import MANTISSA, TiledWeight
from moe_ray.model.families import ClampedSwiGLU

ROWS: Final = 16
"""Of a program. It is one number for every count of rows, so that instructions and sums are the same."""
PROGRAMS: Final = 512
"""So many at least share the work of a product at one row, where its inputs are long enough: about four for each
multiprocessor of a large card."""
LEAST_BLOCKS: Final = 8
"""Of inputs in a part of a product: shorter ones have too little to load ahead."""
MOST_ROWS: Final = 512
"""Computed at a time: the parts of their sums are to be added, and lie in memory until then."""
AHEAD: Final = 16 * 1024
"""Bytes of gate and up that a program has on their way. A multiprocessor of a large card needs about 18 KiB to be fed
(3.35 TB/s times 700 ns, by 132), and at one row has about two such programs."""
WIDTH: Final = 512
"""Outputs of a program that adds parts."""


def parts_of(weight: TiledWeight) -> int:
    """In how many parts a product with this weight is summed: by its shape alone, never by the count of rows.

    >>> parts_of(down)  # Mixtral-8x7B's, 4096 outputs of 14336 inputs
    8
    """
    how = weight.how
    return max(1, min(-(-PROGRAMS // how.row_tiles), how.blocks // LEAST_BLOCKS))


def gate_up(
    weight: TiledWeight,
    x: torch.Tensor,  # [T, K]
    out: torch.Tensor,  # [T, N]
    bias: torch.Tensor | None = None,  # float32 [2 N]
    extra: torch.Tensor | None = None,  # float32 [T, 2 N]
    clamped: ClampedSwiGLU | None = None,
) -> Launch:
    """Gate and up of an expert and their activation; `weight` holds both in turns."""
    gating: dict[str, Constant] = {"LIMIT": None, "ALPHA": None}
    if clamped is not None:
        gating = {"LIMIT": clamped.limit, "ALPHA": clamped.alpha}
    return Launch(
        gate_up_kernel,
        (-(-len(x) // ROWS), weight.how.row_tiles, 1),
        {"x": x, **_tensors(weight), "bias": bias, "extra": extra, "out": out},
        {"count": len(x)},
        {**_constants(weight), **gating},
        stages=_stages(weight),
    )


def product(weight: TiledWeight, x: torch.Tensor, out: torch.Tensor) -> Launch:
    """x [T, K] W^T into `out` [P, T, N]: in `parts_of(weight)` parts, to be added by `finish`, or in one."""
    per_part = -(-weight.how.blocks // len(out))
    return Launch(
        product_kernel,
        (-(-len(x) // ROWS), weight.how.row_tiles, len(out)),
        {"x": x, **_tensors(weight), "out": out},
        {"count": len(x)},
        {**_constants(weight), "PER_PART": per_part},
        stages=_stages(weight),
    )


def finish(
    parts: torch.Tensor,  # float32 [P, T, N]
    out: torch.Tensor,  # [T, N]
    bias: torch.Tensor | None = None,  # [N]
    extra: torch.Tensor | None = None,  # float32 [T, N]
    weights: torch.Tensor | None = None,  # [T]
) -> Launch:
    """The sum of a product's parts, with bias and `extra`, each row times its weight."""
    count, n = out.shape
    return Launch(
        finish_kernel,
        (count, -(-n // WIDTH), 1),
        {"parts": parts, "bias": bias, "extra": extra, "weights": weights, "out": out},
        {"count": count},
        {"N": n, "PARTS": len(parts), "WIDTH": WIDTH},
    )


def linear(
    weight: TiledWeight, x: torch.Tensor, bias: torch.Tensor | None = None, start: Callable[[Launch], None] = Launch.run
) -> torch.Tensor:
    """x [T, K] W^T plus bias [N]: [T, N] in the dtype of x. `start`: what is done with each launch."""
    x, out = x.contiguous(), x.new_empty(len(x), weight.how.n)
    for first in range(0, len(x), MOST_ROWS):
        part = slice(first, first + MOST_ROWS)
        rows, into = x[part], out[part]
        sums = x.new_empty(parts_of(weight), *into.shape, dtype=torch.float32)
        start(product(weight, rows, sums))
        start(finish(sums, into, bias))
    return out


def _tensors(weight: TiledWeight) -> dict[str, torch.Tensor | None]:
    return {
        "order": weight.order,
        "codes": weight.codes,
        "scales": weight.scales,
        "offsets": weight.offsets,
        "levels": weight.levels,
        "multiplier": weight.multiplier,
    }


def _constants(weight: TiledWeight) -> dict[str, Constant]:
    how = weight.how
    return {
        "N": how.n,
        "K": how.k,
        "BLOCKS": how.blocks,
        "GROUP": 0 if how.grouping is None else how.grouping.group,
        "GROUPS": how.groups,
        "BITS": how.bits,
        "HALVES": how.halves,
        "MANTISSA": 0 if how.grouping is None or how.grouping.float8 is None else MANTISSA[how.grouping.float8],
        "TILE": how.tile,
        "STEP": how.step,
        "ROWS": ROWS,
        # Triton's interpreter multiplies bfloat16 as if its bits were whole numbers; products in float32 are the same.
        "WIDEN": INTERPRETED and how.dtype == torch.bfloat16,
    }


def _stages(weight: TiledWeight) -> int:
    """Blocks in shared memory: that which is multiplied, and those that are loaded meanwhile."""
    if weight.how.dtype == torch.float32:
        return 2  # multiplied without tensor cores, which takes longer than any load
    block = weight.how.tile * weight.how.step * weight.codes.itemsize
    return 1 + min(max(AHEAD // (2 * block), 2), 4)
