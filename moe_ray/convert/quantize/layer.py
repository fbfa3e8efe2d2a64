"""One layer on its way from floats to codes: what is written for it, and what the next layer sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.convert.quantize.calibration import CalibrationRun, ExpertInputs, expert_inputs
from moe_ray.convert.quantize.config import LayerReport, QuantizeConfig
from moe_ray.convert.quantize.experts import (
    ExpertCodes,
    ExpertMatrices,
    awq_expert,
    gptq_expert,
    rtn,
    smoothing,
)
from moe_ray.convert.quantize.gptq import gptq
from moe_ray.convert.quantize.integer_scheme import IntegerGrid
from moe_ray.model.compute.torch.trunk import LayerTensors
from moe_ray.model.formats import GroupedCodes
from moe_ray.model.formats.rounding import round_to_nearest

ENOUGH: Final = 512
"""Calibration rows of an expert from which on it is calibrated on its own alone."""

COMPARED: Final = 256
"""Rows of an expert whose outputs are compared with those of its floats, for the report."""

Read = Callable[[int], ExpertMatrices]
"""Reads an expert of the layer from the checkpoint."""
Take = Callable[[int, ExpertCodes], None]
"""Takes an expert's codes, to write them."""


@dataclass(slots=True)
class _Sums:
    """Squared changes of a layer, and what they are a fraction of."""

    change: float = 0.0
    whole: float = 0.0

    def add(self, rounded: torch.Tensor, exact: torch.Tensor) -> None:
        self.change += float((rounded - exact).square().sum())
        self.whole += float(exact.square().sum())

    @property
    def fraction(self) -> float:
        return (self.change / self.whole) ** 0.5 if self.whole else 0.0


def round_attention(
    run: CalibrationRun | None, weights: LayerTensors, config: QuantizeConfig
) -> tuple[GroupedCodes, GroupedCodes] | None:
    """The codes of qkv [(heads + 2 kv_heads) * head_dim, D] and of the output projection; adds the layer's attention.

    None where the trunk stays as it is. By GPTQ where that is the method, else by rounding to the nearest.
    """
    how = config.attention
    qkv, out = weights.qkv, weights.out
    found: tuple[GroupedCodes, GroupedCodes] | None = None
    if run is None:
        return None if how is None else (round_to_nearest(qkv, how), round_to_nearest(out, how))
    states = run.attention_inputs(weights)
    if how is None:
        mixed = run.attended(states, qkv)
    else:
        by_gptq = config.method == "gptq"
        rounded = gptq(qkv, states.T @ states, IntegerGrid(how)) if by_gptq else round_to_nearest(qkv, how)
        mixed = run.attended(states, torch.from_numpy(rounded.values()))
        found = (rounded, gptq(out, mixed.T @ mixed, IntegerGrid(how)) if by_gptq else round_to_nearest(out, how))
        out = torch.from_numpy(found[1].values())
    run.add(F.linear(mixed, out))
    return found


def round_experts_blindly(count: int, read: Read, take: Take, config: QuantizeConfig) -> LayerReport:
    """Round a layer's experts to the nearest codes, one at a time."""
    changed = _Sums()
    for index in range(count):
        expert = read(index)
        codes = rtn(expert, config)
        take(index, codes)
        _count_weights(changed, codes, expert)
    return LayerReport(changed.fraction)


def round_experts(
    run: CalibrationRun, weights: LayerTensors, read: Read, take: Take, config: QuantizeConfig, dtype: torch.dtype
) -> tuple[LayerReport, LayerTensors]:
    """Round a layer's experts by what they see, one at a time; adds the layer's experts to the run.

    Returns the weights of the trunk's layer, whose norm and gate AWQ changes (to values of `dtype`).
    """
    states = run.expert_states(weights.post_norm)
    chosen, routing = run.route(states, weights.gate)

    def seen(index: int) -> ExpertInputs:
        return expert_inputs(states, chosen, routing, index, ENOUGH)

    count = len(weights.gate)
    exponent: float | None = None
    inputs_scale, inner_scales = torch.ones(states.shape[1]), None
    if config.method == "awq":
        found = smoothing(_all(read, count), seen, states.abs().mean(0), run, config)
        exponent, inner_scales = found.exponent, found.inner
        weights, inputs_scale = fold(weights, found.inputs, dtype)
    changed, outputs, added = _Sums(), _Sums(), torch.zeros_like(states)
    tokens = []
    for index in range(count):
        expert, inputs = read(index), seen(index)
        if inner_scales is not None:
            expert = expert.scaled(inputs_scale, inner_scales[index])
            inputs = replace(inputs, rows=inputs.rows / inputs_scale)
            codes = awq_expert(expert, inputs, run, config)
        else:
            codes = gptq_expert(expert, inputs, run, config)
        take(index, codes)
        _count_weights(changed, codes, expert)
        tokens.append(inputs.own)
        which, slot = (chosen == index).nonzero(as_tuple=True)
        rows, weight = states[which] / inputs_scale, routing[which, slot, None]
        made = _output(run, rows, codes.values()) * weight
        added.index_add_(0, which, made)
        outputs.add(made[:COMPARED], _output(run, rows[:COMPARED], expert) * weight[:COMPARED])
    run.add(added)
    return LayerReport(changed.fraction, outputs.fraction, tuple(tokens), exponent), weights


def fold(weights: LayerTensors, scale: torch.Tensor, dtype: torch.dtype) -> tuple[LayerTensors, torch.Tensor]:
    """Divide what the norm gives by `scale` [D] and multiply the gate's columns by it: the router chooses as before.

    Returns the layer and the scale that the norm, rounded to `dtype`, really divides by.
    """
    norm = (weights.post_norm / scale).to(dtype).float()
    really = torch.where(norm == 0, 1.0, weights.post_norm / norm)
    return replace(weights, post_norm=norm, gate=(weights.gate * really).to(dtype).float()), really


def _all(read: Read, count: int) -> Iterator[ExpertMatrices]:
    return (read(index) for index in range(count))


def _output(run: CalibrationRun, rows: torch.Tensor, expert: ExpertMatrices) -> torch.Tensor:
    return F.linear(run.inner(rows, expert.w1, expert.w3), expert.w2)


def _count_weights(changed: _Sums, codes: ExpertCodes, expert: ExpertMatrices) -> None:
    values = codes.values()
    for rounded, exact in ((values.w1, expert.w1), (values.w3, expert.w3), (values.w2, expert.w2)):
        changed.add(rounded, exact)
