"""Which matrix of a model a module of an adapter adds to, by the names of its family's layouts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from moe_ray.model.families import ExpertRole, Layout, Role
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import head_weight, weights_of_expert, weights_of_trunk

EXPERT_ROLES: Final[tuple[ExpertRole, ...]] = ("gate", "up", "down")
SHARED_ROLES: Final[tuple[Role, ...]] = ("shared_gate", "shared_up", "shared_down")
"""Of the expert that every token goes to, in the order of `EXPERT_ROLES`."""
DENSE_ROLES: Final[tuple[Role, ...]] = ("dense_gate", "dense_up", "dense_down")
"""Of what a layer without experts has in their stead, in the same order."""
ADAPTED: Final[tuple[Role, ...]] = (
    *("embed", "q", "k", "v", "out", "router", "head"),
    *EXPERT_ROLES,
    *SHARED_ROLES,
    *DENSE_ROLES,
    "shared_share",
)
"""What backends can add to; of latent attention, to `out` alone."""

_OF_NETWORKS: Final = frozenset((*EXPERT_ROLES, *SHARED_ROLES, *DENSE_ROLES, "router", "shared_share"))
"""What a layer has with experts or without them."""


@dataclass(frozen=True, slots=True)
class Module:
    """A matrix of the model, or all experts of a layer in stacked tensors."""

    role: Role | None
    """None: of several."""
    layer: int | None
    expert: int | None
    shape: tuple[int, int]
    """[N, K]; of a stack (0, 0)."""
    stacked: bool = False


class Names:
    """The names that peft gives the modules of one model."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        weights = [*weights_of_trunk(model), head_weight(model), *weights_of_expert(model, 0, 0)]
        self._shapes = {w.role: (w.shape[0], w.shape[1]) for w in weights if len(w.shape) == 2}
        self._patterns: dict[str, tuple[Role | None, bool]] = {}
        for layout in model.family.layouts:
            for role, stem in layout.stems.items():
                stacked = _is_stacked(layout, role)
                if stacked:  # a parameter of the module that holds all experts
                    stem = stem.rpartition(".")[0]
                if role in self._shapes or stacked:
                    self._patterns[_pattern(stem, stacked)] = (None if stacked else role, stacked)

    def adapted(self, role: Role) -> bool:
        """Whether backends can add to what this model has of a role."""
        return role in ADAPTED and (self._model.latent is None or role != "q")

    def find(self, module: str) -> Module | None:
        """What a module is; None: none of this model's."""
        for pattern, (role, stacked) in self._patterns.items():
            found = re.fullmatch(pattern, module)
            if found is None:
                continue
            numbers = {key: int(value) for key, value in found.groupdict().items()}
            layer, expert = numbers.get("layer"), numbers.get("expert")
            if (layer or 0) >= self._model.num_hidden_layers or (expert or 0) >= self._model.num_local_experts:
                continue
            dense = layer in self._model.dense_layers
            if layer is not None and (role in DENSE_ROLES) != dense and (stacked or role in _OF_NETWORKS):
                continue
            if role in EXPERT_ROLES and expert is None:  # the only one of a dense model
                expert = 0
            return Module(role, layer, expert, (0, 0) if role is None else self._shapes[role], stacked)
        return None


def _is_stacked(layout: Layout, role: Role) -> bool:
    return any(role in stack for stack in layout.stacks)


def _pattern(stem: str, stacked: bool) -> str:
    escaped = re.escape(stem).replace(re.escape("{layer}"), r"(?P<layer>\d+)")
    escaped = escaped.replace(re.escape("{expert}"), r"(?P<expert>\d+)")
    return escaped + (r"(?:\.base_layer)*" if stacked else "")
