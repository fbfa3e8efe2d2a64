"""What a model family is: its keys in config.json, the names of its tensors, how its router weighs experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from moe_ray.model.formats import Place

Bias = Literal["input_norm_bias", "q_bias", "k_bias", "v_bias", "out_bias", "post_norm_bias", "norm_bias", "head_bias"]
SharedRole = Literal["shared_gate", "shared_up", "shared_down", "shared_share"]
"""Of the expert that every token goes to, beside those that its router chose; the last: how much of it counts."""
TrunkRole = (
    Literal["embed", "input_norm", "q", "k", "v", "q_norm", "k_norm", "out", "post_norm", "router", "norm", "head"]
    | SharedRole
    | Bias
)
ExpertRole = Literal["gate", "up", "down"]
Role = TrunkRole | ExpertRole
BIASES: Final[tuple[Bias, ...]] = get_args(Bias)
ROPE_TYPES: Final = ("default", "linear", "yarn", "llama3")


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
    """How router logits become the weights of a token's experts. `moe.route` computes it.

    Softmax over all experts, then the top k; renormalised this is what softmax over the top k gives, too.
    """

    renormalise: bool
    """Divide the k weights by their sum."""
    jitter: float | None = None
    """SparseMixer (Phi): experts whose logits are this near the best, in twice this share of it, share its softmax."""


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
        if weight.role in BIASES:
            return Place(stem, bare=True)
        for stack in self.stacks:
            if weight.role in stack and weight.expert is not None:
                index = weight.expert * len(stack) + stack.index(weight.role)
                return Place(stem, num_experts, len(stack), index)
        return Place(stem)


@dataclass(frozen=True, slots=True)
class Flag:
    """Whether something is there: a key of config.json, and what its absence means."""

    key: str | None
    """None: no key tells."""
    default: bool


ATTENTION_BIASES: Final[Mapping[Bias, Flag]] = dict.fromkeys(
    ("q_bias", "k_bias", "v_bias", "out_bias"), Flag("attention_bias", False)
)
"""Where one key tells of all four."""
QWEN_IRRELEVANT: Final = ("sliding_window", "max_window_layers", "use_qk_norm")
"""The first two count with `use_sliding_window`, which is refused; of the last, some files say what all models do."""


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """What a family calls things in config.json, and what an absent key means there."""

    intermediate_size: str
    """Of one expert."""
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    hidden_act: str = "silu"
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: the hidden size divided by the number of query heads."""
    num_experts: tuple[str, ...] = ()
    """The first that is there counts. (): the model is dense, one expert that every token goes to."""
    num_experts_default: int = 1
    num_experts_per_tok: int = 1
    norm_topk_prob: bool | None = None
    """None: the family has no such key, and renormalises as its router says."""
    router_jitter_noise: float | None = None
    """None: the family has no such key."""
    biases: Mapping[Bias, Flag] = field(default_factory=dict)
    """Those that a model may have."""
    shared_intermediate_size: str | None = None
    """Of the shared expert; None: there is none."""
    multipliers: bool = False
    """Whether `embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling` count."""
    sliding_window: bool = False
    """Whether `sliding_window` counts."""
    sliding_window_default: int | None = None
    rope_types: tuple[str, ...] = ROPE_TYPES
    irrelevant: tuple[str, ...] = ()
    """Keys that change what other families compute, and mean nothing in this one."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of `families.FAMILIES`."""

    model_type: str
    """In config.json."""
    config: ConfigKeys
    layouts: tuple[Layout, ...]
    """The one that converters write comes first; a checkpoint has the one that knows most of its tensors."""
    router: Router = Router(renormalise=True)
    norm: Literal["rms", "layer"] = "rms"
    """Zhang & Sennrich 2019 (arXiv:1910.07467) or Ba et al. 2016 (arXiv:1607.06450)."""
    qk_norm: Literal["head", "whole"] | None = None
    """What of a token's queries and keys is normalised before they are rotated: each head, or all heads together."""
    unused: tuple[str, ...] = ("*rotary_emb.inv_freq",)
    """Patterns of tensors that older checkpoints hold and that nothing computes with."""
