"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounds column by column, later columns making up for the error."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from moe_ray.model.formats import GroupedCodes, Grouping
from moe_ray.model.formats.rounding import fit, nearest, values_of

BLOCK: Final = 128
"""Columns whose errors reach the columns after them in one product (section 3.3, "lazy batch-updates")."""
LAST_DAMPING: Final = 1.0


def gptq(
    values: torch.Tensor,  # [N, K]
    hessian: torch.Tensor,  # [K, K]
    grouping: Grouping,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> GroupedCodes:
    """Codes for a weight that change its outputs least: tr(E H E'), E [N, K] the change of the weight, is kept small.

    `hessian` is the sum of x x' over the inputs x that the weight is calibrated on; an input that was never seen is
    rounded by itself. `damping`: of the mean of its diagonal, added to the diagonal. `act_order`: the inputs with the
    largest diagonal first; groups are then of columns in that order, which `GroupedCodes.order` says.
    """
    n, k = values.shape
    weight = values.float().clone()
    curvature = hessian.float().clone()
    order: torch.Tensor | None = None
    if act_order:
        order = curvature.diagonal().argsort(descending=True, stable=True)
        weight, curvature = weight[:, order].contiguous(), curvature[order][:, order]
        grouping = Grouping(grouping.bits, grouping.group, grouping.offsets, grouping.levels, reordered=True)
    importance = curvature.diagonal().clone()
    importance[importance == 0] = importance[importance > 0].min() if bool((importance > 0).any()) else 1.0
    factor = _inverse_factor(curvature, damping)
    codes = torch.empty((n, k), dtype=torch.uint8)
    scales = torch.empty((n, k // grouping.group))
    offsets = torch.empty_like(scales) if grouping.offsets else None
    block = math.gcd(grouping.group, BLOCK) if grouping.group > BLOCK else BLOCK // grouping.group * grouping.group
    for start in range(0, k, block):
        end = min(start + block, k)
        errors = torch.empty((n, end - start))
        for column in range(start, end):
            group = column // grouping.group
            if column % grouping.group == 0:
                part = slice(column, column + grouping.group)
                scale, offset = fit(weight[:, part].contiguous(), grouping, importance[part])
                scales[:, group] = scale[:, 0]
                if offsets is not None and offset is not None:
                    offsets[:, group] = offset[:, 0]
            here = weight[:, column : column + 1].contiguous()
            scale = scales[:, group : group + 1]
            offset = None if offsets is None else offsets[:, group : group + 1]
            code = nearest(here, scale, offset, grouping)
            codes[:, column] = code[:, 0]
            error = (here - values_of(code, scale, offset, grouping)) / factor[column, column]
            weight[:, column + 1 : end].addr_(error[:, 0], factor[column, column + 1 : end], alpha=-1)
            errors[:, column - start] = error[:, 0]
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return GroupedCodes(
        grouping,
        codes.numpy(),
        scales.numpy(),
        None if offsets is None else offsets.numpy(),
        None if order is None else order.numpy().astype(np.int32),
    )


def output_error(change: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E'): the squared change of a weight's outputs over its calibration inputs. change E [N, K]."""
    return float(((change @ hessian) * change).sum())


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse (the paper's algorithm 1); damps more where that is too little.

    Changes `hessian`.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        if damping >= LAST_DAMPING:
            raise ArithmeticError("a Hessian with numbers that are not finite")
        damping *= 10
