"""What a KV cache takes: `engine.kv_cache_dtype` in bytes."""

from __future__ import annotations

from typing import Final

from moe_ray.model.formats import dtype_bytes
from moe_ray.model.model_config import ModelConfig

SCALE_BYTES: Final = 4
"""Of int8: the scale of one token's key or value in one head."""


def held_in(configured: str, rows: str) -> str:
    """The dtype of a cache for `engine.kv_cache_dtype`, beside rows of a dtype."""
    return rows if configured == "auto" else configured


def kv_bytes_per_token(model: ModelConfig, held: str) -> int:
    """Bytes of K and V that one token keeps, over all layers, in a float dtype or int8."""
    head = model.head_dim + SCALE_BYTES if held == "int8" else model.head_dim * dtype_bytes(held)
    return 2 * model.num_hidden_layers * model.num_key_value_heads * head
