"""What a model family is: its keys in config.json, the names of its tensors, how its router weighs experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_ray.model.formats import Place

TrunkRole = Literal["embed", "input_norm", "q", "k", "v", "out", "post_norm", "router", "norm", "head"]
ExpertRole = Literal["gate", "up", "down"]
Role = TrunkRole | ExpertRole


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight that a model needs, whatever its family calls it and however it is stored."""

    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    """None: of no layer (embedding, last norm, head)."""
    expert: int | None = None
    """None: the trunk's."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Router:
    """How router logits become the weights of a token's experts: softmax over all experts, then the top k.

    `moe.route` computes it.
    """

    renormalise: bool
    """Divide the k weights by their sum."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which checkpoints of a family name their tensors."""

    stems: Mapping[Role, str]
    """Role → name without suffix; `{layer}` and `{expert}` stand for their numbers."""
    stacks: tuple[tuple[ExpertRole, ...], ...] = ()
    """Roles whose weights lie one above the other in a tensor that stacks all experts; () : each has its own."""
    interleaved: bool = False
    """Whether the rows of q and k that rotary embeddings turn together lie side by side (Mistral's own files, GGUF).

    Hugging Face has the first of all pairs of a head in its first half of rows, and so does the model."""

    def place(self, weight: Weight, num_experts: int) -> Place:
        """Where this layout keeps a weight."""
        stem = self.stems[weight.role].format(layer=weight.layer, expert=weight.expert)
        for stack in self.stacks:
            if weight.role in stack and weight.expert is not None:
                index = weight.expert * len(stack) + stack.index(weight.role)
                return Place(stem, num_experts, len(stack), index)
        return Place(stem)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """What a family calls two numbers in config.json, and what an absent key means there."""

    num_experts: str
    intermediate_size: str
    """Of one expert."""
    num_experts_default: int
    num_experts_per_tok: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    hidden_act: str


@dataclass(frozen=True, slots=True)
class Family:
    """One row of `families.FAMILIES`."""

    model_type: str
    """In config.json."""
    config: ConfigKeys
    router: Router
    layouts: tuple[Layout, ...]
    """The one that converters write comes first; a checkpoint has the one that knows most of its tensors."""
    unused: tuple[str, ...]
    """Patterns of tensors that older checkpoints hold and that nothing computes with."""
