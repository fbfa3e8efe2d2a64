"""Which models Triton's kernels can compute, decided from plain values. Loads no kernel, and not Triton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from moe_ray.model.formats.grouped import Grouping
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.codes import GROUPS, lacks

TrunkPart = Literal["attention", "norm", "router", "shared"]
"""What a trunk computes with torch where there is no kernel for the model."""
WIDEST_HEAD: Final = 256
"""Elements of a head whose tiles fit a card's shared memory."""
MOST_QUERY_HEADS: Final = 64
"""Of a KV head: they are rows of one tile."""


def trunk_by_torch(model: ModelConfig) -> Mapping[TrunkPart, str]:
    """The parts of a trunk by Triton that torch computes for this model, and why, half a sentence each."""
    found: dict[TrunkPart, str] = {}
    group = -(-model.num_attention_heads // model.num_key_value_heads)
    if model.latent is not None:
        found["attention"] = "latent attention"
    elif model.head_dim > WIDEST_HEAD or model.head_dim % 2 or group > MOST_QUERY_HEADS:
        found["attention"] = f"attention for head_dim {model.head_dim} with {group} query heads per KV head"
    if model.family.norm != "rms":
        found["norm"] = "LayerNorm"
    if model.router.jitter is not None:
        found["router"] = "SparseMixer"
    elif model.router.groups != 1:
        found["router"] = "routing by groups of experts"
    if (model.shared_intermediate_size or model.dense_intermediate_size) and experts_lack(model):
        found["shared"] = f"experts that all tokens go to, whose activation is {model.hidden_act}"
    return found


def codes_lack(grouping: Grouping) -> str:
    """Why kernels cannot compute on codes that are grouped so; empty where they can."""
    if grouping.float8 is None:
        return lacks(grouping)
    if grouping.group % GROUPS[0]:
        return f"groups of {grouping.group} inputs, which is not a multiple of {GROUPS[0]}"
    return ""


def experts_lack(model: ModelConfig) -> tuple[str, ...]:
    """Why the experts of `model` cannot be computed, a sentence each; (): they can. Any size can."""
    if model.hidden_act != "silu":
        return (f"Triton's kernels compute silu, not {model.hidden_act}",)
    return ()
