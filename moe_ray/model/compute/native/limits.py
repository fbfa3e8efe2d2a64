"""Which models the native kernels can compute, decided from plain values. Loads no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moe_ray.model.config_parts import LatentAttention
from moe_ray.model.families.family import ATTENTION_BIASES
from moe_ray.model.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class KernelLimits:
    """What the native kernels can compute, on every instruction set."""

    dtypes: frozenset[str]
    activations: frozenset[str]
    lanes: int
    """Row lengths and head dimensions are multiples of this."""
    groups: frozenset[int]
    """Query heads per KV head."""
    widest_head: int
    """Largest head dimension."""


NATIVE: Final = KernelLimits(
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    activations=frozenset({"silu"}),
    lanes=32,
    groups=frozenset({1, 2, 3, 4, 5, 6, 7, 8, 16}),
    widest_head=1024,
)


def trunk_lacks(kernels: KernelLimits, model: ModelConfig) -> tuple[str, ...]:
    """Why the trunk of `model` cannot be computed, a sentence each; (): it can."""
    lacks = []
    other = {
        "LayerNorm": model.family.norm != "rms",
        "SparseMixer": model.router.jitter is not None,
        "biases of norms and head": bool(model.biases - ATTENTION_BIASES.keys() - {"router_bias"}),
    }
    if found := [name for name, here in other.items() if here]:
        lacks.append(f"native kernels do not compute {', '.join(found)}, which this model has")
    for size, whose in (
        (model.shared_intermediate_size or 0, "the shared expert"),
        (model.dense_intermediate_size, "what layers without experts have in their stead"),
    ):
        if size % kernels.lanes:
            lacks.append(f"the size {size} of {whose} is not a multiple of {kernels.lanes}")
        if size and model.hidden_act not in kernels.activations:
            lacks.append(f"the activation of {whose} is {model.hidden_act}")
    if model.hidden_size % kernels.lanes:
        lacks.append(f"hidden_size {model.hidden_size} is not a multiple of {kernels.lanes}")
    if model.latent is not None:
        return (*lacks, *_latents_lack(kernels, model.latent))
    group = model.num_attention_heads // model.num_key_value_heads
    if model.head_dim % kernels.lanes or model.head_dim > kernels.widest_head or group not in kernels.groups:
        lacks.append(f"no attention for head_dim {model.head_dim} with {group} query heads per KV head")
    return tuple(lacks)


def _latents_lack(kernels: KernelLimits, latent: LatentAttention) -> tuple[str, ...]:
    sizes = {
        "q_lora_rank": latent.q_rank or 0,
        **{"kv_lora_rank": latent.kv_rank, "qk_nope_head_dim": latent.nope, "qk_rope_head_dim": latent.rope},
        "v_head_dim": latent.value,
    }
    lacks = [
        f"{key} {size} is not a multiple of {kernels.lanes}" for key, size in sizes.items() if size % kernels.lanes
    ]
    if latent.width > kernels.widest_head:
        lacks.append(f"kv_lora_rank and qk_rope_head_dim are {latent.width} together, more than {kernels.widest_head}")
    return tuple(lacks)


def experts_lack(kernels: KernelLimits, model: ModelConfig) -> tuple[str, ...]:
    """Why the experts of `model` cannot be computed, a sentence each; (): they can."""
    lacks = []
    if model.hidden_act not in kernels.activations:
        lacks.append(f"native kernels compute {', '.join(sorted(kernels.activations))}, not {model.hidden_act}")
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.intermediate_size)):
        if size % kernels.lanes:
            lacks.append(f"{name} {size} is not a multiple of {kernels.lanes}")
    return tuple(lacks)
