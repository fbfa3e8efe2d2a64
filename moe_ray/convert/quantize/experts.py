"""Rounds the experts of one layer, each method its function: weights and what they see in, codes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moe_ray.convert.quantize.awq import Search, scale_of, search
from moe_ray.convert.quantize.calibration import CalibrationRun, ExpertInputs
from moe_ray.convert.quantize.config import QuantizeConfig
from moe_ray.convert.quantize.gptq import gptq
from moe_ray.model.formats import GroupedCodes
from moe_ray.model.formats.rounding import round_to_nearest


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """One expert's weights as floats."""

    w1: torch.Tensor  # [I, D]
    w3: torch.Tensor  # [I, D]
    w2: torch.Tensor  # [D, I]

    def scaled(self, inputs: torch.Tensor, inner: torch.Tensor) -> ExpertMatrices:
        """The expert whose inputs are divided by `inputs` [D] and whose w3's outputs by `inner` [I]: the same one."""
        return ExpertMatrices(self.w1 * inputs, self.w3 * inputs / inner[:, None], self.w2 * inner)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCodes:
    """One expert's weights as codes."""

    w1: GroupedCodes
    w3: GroupedCodes
    w2: GroupedCodes

    def values(self) -> ExpertMatrices:
        return ExpertMatrices(*(torch.from_numpy(codes.values()) for codes in (self.w1, self.w3, self.w2)))


Seen = Callable[[int], ExpertInputs]
"""What an expert of the layer is calibrated on."""


def rtn(expert: ExpertMatrices, config: QuantizeConfig) -> ExpertCodes:
    """Rounds each weight to the nearest code: no calibration."""
    return ExpertCodes(*map(config.scheme.nearest, (expert.w1, expert.w3, expert.w2)))


def gptq_expert(expert: ExpertMatrices, seen: ExpertInputs, run: CalibrationRun, config: QuantizeConfig) -> ExpertCodes:
    """GPTQ; w2 is calibrated on what the rounded w1 and w3 make of the rows."""
    joined = torch.cat((expert.w1, expert.w3))  # they share their inputs, and so the Hessian
    both = _by_gptq(joined, seen, seen.hessian(), config)
    w1, w3 = (both.rows(part) for part in (slice(0, len(expert.w1)), slice(len(expert.w1), None)))
    inner = run.inner(seen.rows, *(torch.from_numpy(codes.values()) for codes in (w1, w3)))
    return ExpertCodes(w1, w3, _by_gptq(expert.w2, seen, seen.hessian(inner), config))


def _by_gptq(weight: torch.Tensor, seen: ExpertInputs, hessian: torch.Tensor, config: QuantizeConfig) -> GroupedCodes:
    inputs, scheme = weight.shape[1], config.scheme
    act_order = config.act_order or scheme.free_order
    damping = scheme.damping * seen.damping(inputs)
    return gptq(weight, hessian, scheme.grid(inputs), damping=damping, act_order=act_order)


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """AWQ's scales of one layer: of the experts' shared inputs, and of what each expert's w2 sees."""

    exponent: float
    inputs: torch.Tensor  # [D]
    inner: list[torch.Tensor]  # [I] each


def smoothing(
    experts: Iterator[ExpertMatrices], seen: Seen, size: torch.Tensor, run: CalibrationRun, config: QuantizeConfig
) -> Smoothing:
    """The scales that lose least in the outputs of w1, w3 and w2. size [D]: mean of the layer's |states|.

    All experts of a layer see the output of one norm, so that one scale of their inputs is searched for all of them.
    """
    how = config.experts
    total: Search | None = None
    inner_scales = []
    for index, expert in enumerate(experts):
        inputs = seen(index)
        inner = run.inner(inputs.rows, expert.w1, expert.w3)
        inner_size = inputs.size(inner)
        found = search([expert.w2], inputs.sample(inner), inner_size, how)
        inner_scale = scale_of(inner_size, found.best)
        inner_scales.append(inner_scale)
        here = search([expert.w1, expert.w3 / inner_scale[:, None]], inputs.sample(), size, how)
        total = here if total is None else total + here
    assert total is not None, "a layer has experts"
    return Smoothing(total.best, scale_of(size, total.best), inner_scales)


def awq_expert(expert: ExpertMatrices, seen: ExpertInputs, run: CalibrationRun, config: QuantizeConfig) -> ExpertCodes:
    """Rounds weights that are scaled already; the scale of each group minds how large its inputs are."""
    how = config.experts
    power = seen.power()
    w1, w3 = (round_to_nearest(weight, how, power) for weight in (expert.w1, expert.w3))
    inner = run.inner(seen.rows, *(torch.from_numpy(codes.values()) for codes in (w1, w3)))
    return ExpertCodes(w1, w3, round_to_nearest(expert.w2, how, seen.power(inner)))
