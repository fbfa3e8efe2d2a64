"""Qwen's mixtures: Qwen2-MoE (Yang et al. 2024, arXiv:2407.10671) and Qwen3-MoE (arXiv:2505.09388)."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ATTENTION_BIASES, QWEN_IRRELEVANT, ConfigKeys, Family, Flag
from moe_ray.model.families.gguf_layouts import IN_HALVES
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face

_LAYOUTS: Final = (hugging_face("mlp"), hugging_face("mlp", stack=TRANSFORMERS_STACK), *IN_HALVES)

QWEN2_MOE: Final = Family(
    model_type="qwen2_moe",
    config=ConfigKeys(
        intermediate_size="moe_intermediate_size",
        dense_intermediate_size="intermediate_size",
        shared_intermediate_size="shared_expert_intermediate_size",
        num_experts=("num_experts", "num_local_experts"),
        num_experts_default=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        num_key_value_heads=16,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases={"q_bias": Flag("qkv_bias", True), "k_bias": Flag("qkv_bias", True), "v_bias": Flag("qkv_bias", True)},
        irrelevant=QWEN_IRRELEVANT,
    ),
    layouts=_LAYOUTS,
)

QWEN3_MOE: Final = Family(
    model_type="qwen3_moe",
    config=ConfigKeys(
        intermediate_size="moe_intermediate_size",
        dense_intermediate_size="intermediate_size",
        num_experts=("num_experts", "num_local_experts"),
        num_experts_default=128,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases=ATTENTION_BIASES,
        irrelevant=QWEN_IRRELEVANT,
    ),
    layouts=_LAYOUTS,
    qk_norm="head",
)
