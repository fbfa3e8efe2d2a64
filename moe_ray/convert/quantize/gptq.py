"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounds column by column, later columns making up for the error."""

from __future__ import annotations

import math
from typing import Final

import torch

from moe_ray.convert.quantize.scheme import Grid
from moe_ray.model.formats import GroupedCodes

BLOCK: Final = 128
"""Columns whose errors reach the columns after them in one product (section 3.3, "lazy batch-updates")."""
LAST_DAMPING: Final = 1.0


def gptq(
    values: torch.Tensor,  # [N, K]
    hessian: torch.Tensor,  # [K, K]
    grid: Grid,
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
    exact, curvature = values.float(), hessian.float().clone()
    order: torch.Tensor | None = None
    if act_order:
        order = curvature.diagonal().argsort(descending=True, stable=True)
        exact, curvature = exact[:, order].contiguous(), curvature[order][:, order]
    importance = curvature.diagonal().clone()
    importance[importance == 0] = importance[importance > 0].min() if bool((importance > 0).any()) else 1.0
    factor = _inverse_factor(curvature, damping)
    weight = exact.clone()
    codes = torch.empty((n, k), dtype=torch.uint8)
    block = math.gcd(grid.span, BLOCK) if grid.span > BLOCK else BLOCK // grid.span * grid.span
    for start in range(0, k, block):
        end = min(start + block, k)
        errors = torch.empty((n, end - start))
        for column in range(start, end):
            if column % grid.span == 0:
                grid.fit(weight[:, column:], importance[column:])
            here = weight[:, column : column + 1].contiguous()
            code, value = grid.round(here)
            codes[:, column] = code[:, 0]
            error = (here - value) / factor[column, column]
            weight[:, column + 1 : end].addr_(error[:, 0], factor[column, column + 1 : end], alpha=-1)
            errors[:, column - start] = error[:, 0]
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    curvature.diagonal().add_(damping * float(curvature.diagonal().mean()))
    return grid.finish(codes, order, exact, curvature)


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
