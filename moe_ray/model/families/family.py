"""What a model family is: its keys in config.json, the names of its tensors, how its router weighs experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from moe_ray.model.formats import Place

Bias = Literal[
    "input_norm_bias",
    "q_bias",
    "k_bias",
    "v_bias",
    "out_bias",
    "post_norm_bias",
    "router_bias",
    "norm_bias",
    "head_bias",
]
SharedRole = Literal["shared_gate", "shared_up", "shared_down", "shared_share"]
"""Of the expert that every token goes to, beside those that its router chose; the last: how much of it counts."""
DenseRole = Literal["dense_gate", "dense_up", "dense_down"]
"""Of the network that a layer without experts has in their stead."""
LatentRole = Literal["q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b"]
"""Of multi-head latent attention (`LatentAttention`), beside `out` and, where queries have no latents, `q`."""
TrunkRole = (
    Literal["embed", "input_norm", "q", "k", "v", "q_norm", "k_norm", "out", "post_norm", "router", "norm", "head"]
    | Literal["sinks"]
    | SharedRole
    | DenseRole
    | LatentRole
    | Literal["router_correction"]
    | Bias
)
ExpertRole = Literal["gate", "up", "down"]
ExpertBias = Literal["gate_bias", "up_bias", "down_bias"]
Role = TrunkRole | ExpertRole | ExpertBias
BIASES: Final[tuple[Bias, ...]] = get_args(Bias)
EXPERT_BIASES: Final[tuple[ExpertBias, ...]] = get_args(ExpertBias)
WHOLE_NAMES: Final[frozenset[Role]] = frozenset({*BIASES, *EXPERT_BIASES, "sinks", "router_correction"})
"""What has a name of its own in a layout, not one to which a format adds its suffix."""
SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers, as `layer_types` names them."""
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

    Softmax over all experts, then the top k; renormalised this is what softmax over the top k gives, too. With
    `groups`, experts lie in groups of equal size, and only those of the best groups are chosen from.
    """

    renormalise: bool
    """Divide the k weights by their sum."""
    jitter: float | None = None
    """SparseMixer (Phi): experts whose logits are this near the best, in twice this share of it, share its softmax."""
    wide: bool = False
    """Whether logits are computed in float32, whatever the dtype of rows."""
    sigmoid: bool = False
    """Whether an expert's score is the sigmoid of its logit, not its share of the softmax."""
    correction: bool = False
    """Whether `router_correction` [E] is added to scores for choosing; weights are of the scores alone."""
    groups: int = 1
    groups_chosen: int = 1
    group_scores: Literal["best", "best two"] = "best"
    """What of its experts' scores ranks a group: the highest, or the sum of the two highest."""
    scale: float = 1.0
    """What weights are multiplied by in the end."""


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """What gpt-oss's experts compute of gate and up: g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit) and u = up
    within -limit and limit.

    OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925), section 2.2.
    """

    limit: float
    alpha: float


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which checkpoints of a family name their tensors."""

    stems: Mapping[Role, str]
    """Role → name without suffix; `{layer}` and `{expert}` stand for their numbers."""
    stacks: tuple[tuple[ExpertRole, ...], ...] = ()
    """Roles whose weights lie one above the other in a tensor that stacks all experts; () : each has its own.

    The biases of these roles are stacked alike."""
    alternate: bool = False
    """Whether the rows of a stack's roles alternate, instead of lying one above the other (gpt-oss)."""
    transposed: bool = False
    """Whether floats of a stack have a row for each input (gpt-oss); quantised ones have one for each output."""
    interleaved: bool = False
    """Whether the rows of q and k that rotary embeddings turn together lie side by side (Mistral's own files, GGUF).
    Of latent attention `LatentAttention.interleaved` tells.

    Hugging Face has the first of all pairs of a head in its first half of rows, and so does the model."""

    def place(self, weight: Weight, num_experts: int) -> Place:
        """Where this layout keeps a weight."""
        stem = self.stems[weight.role].format(layer=weight.layer, expert=weight.expert)
        for stack in self.stacks:
            roles: tuple[Role, ...] = stack if weight.role in stack else _biases_of(stack)
            if weight.role in roles and weight.expert is not None:
                index = weight.expert * len(roles) + roles.index(weight.role)
                transposed = self.transposed and len(weight.shape) == 2
                return Place(stem, num_experts, len(roles), index, alternate=self.alternate, transposed=transposed)
        return Place(stem, bare=weight.role in WHOLE_NAMES)


def _biases_of(stack: tuple[ExpertRole, ...]) -> tuple[ExpertBias, ...]:
    return tuple(EXPERT_BIASES[get_args(ExpertRole).index(role)] for role in stack)


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
class LatentKeys:
    """What absent keys of multi-head latent attention mean."""

    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    interleaved: bool | None = None
    """Where `rope_interleave` is absent; None: there is no such key, and rotary pairs lie side by side."""


@dataclass(frozen=True, slots=True)
class GroupedRouterKeys:
    """What absent keys of DeepSeek's routers mean."""

    routed_scaling_factor: float
    n_group: int | None
    topk_group: int | None
    scoring_func: str
    """The one value that is computed."""
    topk_methods: tuple[str, ...]
    """Those that are computed. The first is meant where the key is absent; "greedy" knows no groups."""


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
    num_experts_per_tok: int | None = 1
    """None: the key must be there."""
    norm_topk_prob: bool | None = None
    """None: the family has no such key, and renormalises as its router says."""
    router_jitter_noise: float | None = None
    """None: the family has no such key."""
    biases: Mapping[Bias, Flag] = field(default_factory=dict)
    """Those that a model may have."""
    clamped_swiglu: ClampedSwiGLU | None = None
    """Where `swiglu_limit` and `swiglu_alpha` are absent; None: experts compute plain SwiGLU of `hidden_act`."""
    shared_intermediate_size: str | None = None
    """Of the shared expert; None: there is none, or `num_shared_experts` tells."""
    num_shared_experts: str | None = None
    """How many of an expert's size lie side by side in the shared expert, all of which counts; 0: there is none."""
    num_shared_experts_default: int = 0
    dense_intermediate_size: str | None = None
    """Of the network of a layer without experts; None: every layer has experts."""
    first_dense: int | None = None
    """Where `first_k_dense_replace` is absent: how many of the first layers have no experts. None: others are named
    by `mlp_only_layers` and `decoder_sparse_step`."""
    latent: LatentKeys | None = None
    """None: attention is by heads of queries, keys and values."""
    grouped_router: GroupedRouterKeys | None = None
    multipliers: bool = False
    """Whether `embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling` count."""
    clip_qkv: bool = False
    """Whether `clip_qkv` counts: bounds of queries, keys and values before they are rotated."""
    sliding_window: bool = False
    """Whether `sliding_window` counts."""
    sliding_window_default: int | None = None
    layer_types: tuple[str, ...] = ()
    """What an absent `layer_types` means, over and over from the first layer on; (): all layers are of one kind."""
    rope_parameters: Mapping[str, object] = field(default_factory=dict)
    """Where the file has none."""
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
    expert_biases: bool = False
    """Whether experts have biases."""
    sinks: bool = False
    """Whether each query head has a learned logit that counts in its softmax, and has no value (attention sinks)."""
    qk_norm: Literal["head", "whole"] | None = None
    """What of a token's queries and keys is normalised before they are rotated: each head, or all heads together."""
    unused: tuple[str, ...] = ("*rotary_emb.inv_freq",)
    """Patterns of tensors that older checkpoints hold and that nothing computes with."""
    further_layers: str | None = None
    """The key that tells of layers behind the last, which predict further tokens and which nothing computes with."""
