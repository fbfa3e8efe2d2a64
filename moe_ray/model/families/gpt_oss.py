"""OpenAI's gpt-oss (2025, arXiv:2508.10925): attention sinks, windows in every other layer, experts with biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moe_ray.model.families.family import (
    ATTENTION_BIASES,
    EXPERT_BIASES,
    FULL,
    SLIDING,
    ClampedSwiGLU,
    ConfigKeys,
    Family,
    Flag,
    Layout,
    Role,
)
from moe_ray.model.families.layouts import TRANSFORMERS_STACK, hugging_face


def _layout() -> Layout:
    """As transformers names them, in bfloat16 and in MXFP4 alike."""
    plain = hugging_face("mlp", router="router", stack=TRANSFORMERS_STACK)
    stems: dict[Role, str] = {**plain.stems, "sinks": "model.layers.{layer}.self_attn.sinks"}
    for bias in EXPERT_BIASES:
        owner: Role = bias.removesuffix("_bias")  # type: ignore[assignment]  # the names of biases are made so
        stems[bias] = f"{stems[owner]}_bias"
    return replace(plain, stems=stems, alternate=True, transposed=True)


GPT_OSS: Final = Family(
    model_type="gpt_oss",
    config=ConfigKeys(
        intermediate_size="intermediate_size",
        num_experts=("num_local_experts", "num_experts"),
        num_experts_default=128,
        num_experts_per_tok=4,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_parameters={
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
        biases={
            **{bias: Flag(flag.key, True) for bias, flag in ATTENTION_BIASES.items()},
            "router_bias": Flag(None, True),
        },
        clamped_swiglu=ClampedSwiGLU(limit=7.0, alpha=1.702),
        sliding_window=True,
        sliding_window_default=128,
        layer_types=(SLIDING, FULL),
    ),
    layouts=(_layout(),),
    expert_biases=True,
    sinks=True,
)
