"""Rounds floats to codes: the nearest level, under the scale of each group that loses least.

What quantises on load and what writes quantised checkpoints both round here, so that they give the same weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes, Grouping

if TYPE_CHECKING:
    import numpy as np
    import torch

NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 levels of 4-bit NormalFloat: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), appendix E."""
FP4: Final = (
    *(0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12),
    *(-0.0, -0.0625 / 12, -8 / 12, -12 / 12, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
)
"""The 16 levels of a 4-bit float (sign, exponent, fraction), in the order of bitsandbytes' codes; same source."""

SHRINKS: Final = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76), 8: (1.0,)}
"""Bits → the fractions of a group's range that a search tries to cover: clipping its ends makes finer steps."""
CELLS: Final = 4096
"""Of the range of a table of levels: so many that no two middles between levels share one."""
CHUNK: Final = 1 << 19
"""Weights that are rounded at a time, so that what comes between stays in a cache."""


def round_to_nearest(
    values: torch.Tensor | np.ndarray,  # [N, K]
    grouping: Grouping,
    importance: torch.Tensor | None = None,  # [K]
    *,
    search: bool = True,
) -> GroupedCodes:
    """The codes nearest to `values`, each group under the scale of the least squared error among those tried.

    `importance` weighs the squared error of each input. Without `search` a scale covers the group's whole range: absmax
    rounding. Scales are exact in bfloat16, and offsets are whole numbers of scales (a zero point that is a code), so
    that every format can store them. Takes any float dtype, computes in float32. `fit` and `nearest` compute on the
    device of their values.
    """
    import torch

    if isinstance(values, torch.Tensor):
        weight = values
    elif values.dtype.name == "bfloat16":  # which torch does not take from numpy
        weight = torch.from_numpy(values.view("int16")).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(values)
    n, k = weight.shape
    codes = torch.empty((n, k), dtype=torch.uint8)
    scales = torch.empty((n, k // grouping.group))
    offsets = torch.empty_like(scales) if grouping.offsets else None
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        chunk = weight[part].float()
        scales[part], offset = fit(chunk, grouping, importance, search=search)
        if offsets is not None and offset is not None:
            offsets[part] = offset
        codes[part] = nearest(chunk, scales[part], offset, grouping)
    return GroupedCodes(grouping, codes.numpy(), scales.numpy(), None if offsets is None else offsets.numpy())


def fit(
    values: torch.Tensor,  # float32 [N, K]
    grouping: Grouping,
    importance: torch.Tensor | None = None,  # [K]
    *,
    search: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale of each group, and its offset in an asymmetric format, each float32 [N, G]."""
    import torch

    groups = values.shape[1] // grouping.group
    grouped = values.view(-1, groups, grouping.group)
    candidates = _candidates(grouped, grouping, SHRINKS[grouping.bits] if search else (1.0,))
    scales, offsets = candidates[0]
    if len(candidates) == 1:
        return scales, offsets
    weigh = None if importance is None else importance.view(groups, grouping.group)
    least = _loss(grouped, scales, offsets, grouping, weigh)
    for scale, offset in candidates[1:]:
        loss = _loss(grouped, scale, offset, grouping, weigh)
        better = loss < least
        least = torch.where(better, loss, least)
        scales = torch.where(better, scale, scales)
        if offsets is not None and offset is not None:
            offsets = torch.where(better, offset, offsets)
    return scales, offsets


def nearest(
    values: torch.Tensor,  # float32 [N, K]
    scales: torch.Tensor,  # [N, G]
    offsets: torch.Tensor | None,  # [N, G]
    grouping: Grouping,
) -> torch.Tensor:
    """The code of each value, uint8 [N, K]; K may be any multiple of G, e.g. one column of each group."""
    import torch

    grouped = values.view(len(values), scales.shape[1], -1)
    return _codes(grouped, scales, offsets, grouping).to(torch.uint8).view(values.shape)


def values_of(
    codes: torch.Tensor,  # [N, K]
    scales: torch.Tensor,  # [N, G]
    offsets: torch.Tensor | None,  # [N, G]
    grouping: Grouping,
) -> torch.Tensor:
    """What codes stand for, float32 [N, K]: `GroupedCodes.values` for `nearest`."""
    grouped = codes.view(len(codes), scales.shape[1], -1).float()
    return _values(grouped, scales, offsets, grouping).view(codes.shape)


def _candidates(
    grouped: torch.Tensor, grouping: Grouping, shrinks: tuple[float, ...]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Scales and offsets to try, [N, G] each; the first covers all values. grouped [N, G, group]."""
    import torch

    low = grouped.amin(-1).clamp_max_(0.0)
    high = grouped.amax(-1).clamp_min_(0.0)
    if grouping.offsets:
        last = 2**grouping.bits - 1
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for shrink in shrinks:
            scale = _storable((high - low) * (shrink / last))
            zero = (-low * shrink / scale).round_().clamp_(0, last)  # the code that stands for 0
            found.append((scale, scale * (MIDDLE[grouping.bits] - zero)))
        return found
    largest = torch.maximum(high, -low)
    if grouping.levels is not None:
        return [(_storable(largest * shrink), None) for shrink in shrinks]
    most = MIDDLE[grouping.bits] - 1
    if len(shrinks) == 1:
        return [(_storable(largest * (shrinks[0] / most)), None)]
    # There is one code more below 0 than above it. The sign of the scale puts it where the largest value is.
    signed = torch.where(high > -low, -largest, largest)
    return [(_storable(scale * shrink), None) for shrink in shrinks for scale in (signed / -most, signed / (most + 1))]


def _storable(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to bfloat16, and 1 where all values of a group are 0."""
    rounded = scale.bfloat16().float()
    return rounded.masked_fill_(rounded == 0, 1.0)


def _loss(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    grouping: Grouping,
    weigh: torch.Tensor | None,
) -> torch.Tensor:
    """The squared error of each group, [N, G]."""
    error = _values(_codes(grouped, scale, offset, grouping), scale, offset, grouping).sub_(grouped).square_()
    return (error if weigh is None else error.mul_(weigh)).sum(-1)


def _codes(grouped: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, how: Grouping) -> torch.Tensor:
    """The nearest codes as whole floats [N, G, group]."""
    if how.levels is not None:
        return _nearest_levels(grouped / scale[..., None], how.levels)
    scaled = grouped if offset is None else grouped - offset[..., None]
    return (scaled * scale.reciprocal()[..., None]).round_().add_(MIDDLE[how.bits]).clamp_(0, 2**how.bits - 1)


def _nearest_levels(scaled: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """The index of the nearest level of each number, as floats of the same shape.

    A number's cell, of many equal ones, says between which two middles of levels it can lie; one comparison the rest.
    """
    import torch

    device = scaled.device
    ordered, order = torch.tensor(levels, dtype=torch.float32, device=device).sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    low, high = float(ordered[0]), float(ordered[-1])
    cell = (high - low) / CELLS
    starts = (
        torch.linspace(low, high, CELLS + 1, device=device)[:-1] - cell / 64
    )  # a number's cell is found but for rounding
    first = torch.bucketize(starts, middles)
    flat = scaled.reshape(-1)
    where = ((flat - low) * (1 / cell)).clamp_(0, CELLS - 1).int()
    index = first.index_select(0, where)
    index += flat > torch.cat((middles, torch.tensor([torch.inf], device=device))).index_select(0, index)
    return order.float().index_select(0, index).view(scaled.shape)


def _values(codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, how: Grouping) -> torch.Tensor:
    import torch

    if how.levels is not None:
        levels = torch.tensor(how.levels, dtype=torch.float32, device=codes.device)
        return levels.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(scale[..., None])
    values = (codes - MIDDLE[how.bits]).mul_(scale[..., None])
    return values if offset is None else values.add_(offset[..., None])
