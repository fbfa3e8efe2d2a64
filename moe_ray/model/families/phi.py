"""Phi-3.5-MoE (Abdin et al. 2024, arXiv:2404.14219), routed by SparseMixer (Liu et al. 2024, arXiv:2409.12136)."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ATTENTION_BIASES, ConfigKeys, Family, Flag, Router
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face

_ALWAYS: Final = Flag(None, True)

PHIMOE: Final = Family(
    model_type="phimoe",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_experts=("num_local_experts", "num_experts"),
        num_experts_default=16,
        num_experts_per_tok=2,
        router_jitter_noise=0.01,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        biases={
            "input_norm_bias": _ALWAYS,
            "post_norm_bias": _ALWAYS,
            "norm_bias": _ALWAYS,
            "head_bias": Flag("lm_head_bias", False),
            **ATTENTION_BIASES,
        },
        sliding_window=True,
        rope_types=("default", "longrope"),
    ),
    layouts=(
        hugging_face("block_sparse_moe", experts=("w1", "w3", "w2")),
        hugging_face("mlp", router="router", stack=TRANSFORMERS_STACK),
    ),
    router=Router(renormalise=False, jitter=0.01),
    norm="layer",
)
