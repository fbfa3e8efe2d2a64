"""The model families that are served: a file and a row each."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_ray.model.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from moe_ray.model.families.family import (
    EXPERT_BIASES,
    FULL,
    SLIDING,
    Bias,
    ClampedSwiGLU,
    ConfigKeys,
    ExpertRole,
    Family,
    Layout,
    Role,
    Router,
    TrunkRole,
    Weight,
)
from moe_ray.model.families.gpt_oss import GPT_OSS
from moe_ray.model.families.granite import GRANITEMOE
from moe_ray.model.families.mixtral import MIXTRAL
from moe_ray.model.families.olmoe import OLMOE
from moe_ray.model.families.phi import PHIMOE
from moe_ray.model.families.qwen import QWEN2_MOE, QWEN3_MOE

__all__ = [
    "EXPERT_BIASES",
    "FAMILIES",
    "FULL",
    "SLIDING",
    "Bias",
    "ClampedSwiGLU",
    "ConfigKeys",
    "ExpertRole",
    "Family",
    "Layout",
    "Role",
    "Router",
    "TrunkRole",
    "Weight",
]

FAMILIES: Final[dict[str, Family]] = {
    row.model_type: row
    for row in (
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE, PHIMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3),
        *(LLAMA, MISTRAL, QWEN2, QWEN3),
    )
}
"""By config.json's model_type."""
