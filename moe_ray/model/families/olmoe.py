"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060)."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ATTENTION_BIASES, ConfigKeys, Family
from moe_ray.model.families.gguf_layouts import IN_HALVES
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face

OLMOE: Final = Family(
    model_type="olmoe",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_experts=("num_experts", "num_local_experts"),
        num_experts_default=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        biases=ATTENTION_BIASES,
        clip_qkv=True,
    ),
    layouts=(hugging_face("mlp"), hugging_face("mlp", stack=TRANSFORMERS_STACK), *IN_HALVES),
    qk_norm="whole",
)
