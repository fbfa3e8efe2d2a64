"""IBM's Granite mixtures (Granite 3.0 language models, 2024), which scale what most models add as it is."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ATTENTION_BIASES, ConfigKeys, Family
from moe_ray.model.families.gguf_layouts import IN_PAIRS
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face

_BLOCK: Final = "block_sparse_moe"

GRANITEMOE: Final = Family(
    model_type="granitemoe",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_experts=("num_local_experts", "num_experts"),
        num_experts_default=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases=ATTENTION_BIASES,
        multipliers=True,
    ),
    layouts=(
        hugging_face(_BLOCK, router="router.layer", stack=("input_linear.weight", "output_linear.weight")),
        hugging_face(_BLOCK, router="router", stack=TRANSFORMERS_STACK),
        *IN_PAIRS,
    ),
)
