"""What a KV cache takes: `engine.kv_cache_dtype` in bytes."""

from __future__ import annotations

from typing import Final

from moe_ray.model.formats import dtype_bytes
from moe_ray.model.model_config import ModelConfig

NARROW: Final = {"int8": 4, "fp8": 0}
"""Bytes that are kept beside the numbers, of one byte each, of one token's key or value in one head: its scale."""


def held_in(configured: str, rows: str) -> str:
    """The dtype of a cache for `engine.kv_cache_dtype`, beside rows of a dtype."""
    return rows if configured == "auto" else configured


def kv_bytes_per_token(model: ModelConfig, held: str) -> int:
    """Bytes of K and V, or of latents, that one token keeps, over all layers, in a float dtype, fp8 or int8."""
    head = model.head_dim * (1 if held in NARROW else dtype_bytes(held)) + NARROW.get(held, 0)
    return model.kv_parts * model.num_hidden_layers * model.num_key_value_heads * head
