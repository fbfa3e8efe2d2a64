"""Low-rank additions to the stacked tensors of all experts of a layer, as peft keeps them for `target_parameters`.

One pair for each parameter: A has the ranks of all experts one after the other, [E * r, inputs]; in B, [outputs,
r * E], the experts alternate for each rank (peft, tuners/lora/layer.py, ParamWrapper.get_delta_weight). Older versions
of peft took a parameter's outputs for its inputs; then b and a are exchanged and transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_ray.model.families import ExpertRole
from moe_ray.model.model_config import ModelConfig

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Stacked:
    """What one pair of tensors adds to."""

    parameter: str
    """Its name in the module of the experts."""
    rank: int
    """Of each expert."""
    num_experts: int
    exchanged: bool
    """Whether A's inputs are the parameter's outputs."""
    rows: Mapping[ExpertRole, slice]
    """Which of the parameter's outputs are those of which matrix."""

    def of_expert(self, a: np.ndarray, b: np.ndarray, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """a [r, K] and b [N, r] of one expert, from the tensors of all."""
        own_a = a.reshape(self.num_experts, self.rank, -1)[expert]
        own_b = b.reshape(-1, self.rank, self.num_experts)[:, :, expert]
        return (own_b.T, own_a.T) if self.exchanged else (own_a, own_b)


def stacked_of(model: ModelConfig, a: tuple[int, ...], b: tuple[int, ...]) -> Stacked | None:
    """What tensors of these shapes add to: the experts of a layer have two stacked parameters, of different shapes."""
    inner, outer, experts = model.intermediate_size, model.hidden_size, model.num_local_experts
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % experts or not a[0]:
        return None
    joined: dict[ExpertRole, slice] = {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}
    if any(layout.alternate for layout in model.family.layouts):
        joined = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    down: dict[ExpertRole, slice] = {"down": slice(0, outer)}
    inputs, outputs, rank = a[1], b[0], a[0] // experts
    for exchanged, (k, n) in ((False, (inputs, outputs)), (True, (outputs, inputs))):
        if (k, n) == (outer, 2 * inner):
            return Stacked("gate_up_proj", rank, experts, exchanged, joined)
        if (k, n) == (inner, outer):
            return Stacked("down_proj", rank, experts, exchanged, down)
    return None
