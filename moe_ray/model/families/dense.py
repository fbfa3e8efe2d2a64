"""Dense models, Llama's (Touvron et al. 2023, arXiv:2302.13971) and its kin: one expert, to which every token goes."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ATTENTION_BIASES, QWEN_IRRELEVANT, ConfigKeys, Family, Flag
from moe_ray.model.families.layouts import hugging_face

_LAYOUTS: Final = (hugging_face("mlp", dense=True), hugging_face("mlp", dense=True, model=""))

LLAMA: Final = Family(
    model_type="llama",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases=ATTENTION_BIASES,
    ),
    layouts=_LAYOUTS,
)

MISTRAL: Final = Family(
    model_type="mistral",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        sliding_window=True,
        sliding_window_default=4096,
    ),
    layouts=_LAYOUTS,
)

QWEN2: Final = Family(
    model_type="qwen2",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases={"q_bias": Flag(None, True), "k_bias": Flag(None, True), "v_bias": Flag(None, True)},
        irrelevant=QWEN_IRRELEVANT,
    ),
    layouts=_LAYOUTS,
)

QWEN3: Final = Family(
    model_type="qwen3",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        biases=ATTENTION_BIASES,
        irrelevant=QWEN_IRRELEVANT,
    ),
    layouts=_LAYOUTS,
    qk_norm="head",
)
