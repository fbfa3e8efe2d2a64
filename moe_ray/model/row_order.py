"""The order of rows that rotary embeddings turn: pairs lie side by side in some checkpoints, the model has halves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moe_ray.model.formats import GroupedCodes, RotaryPairs
from moe_ray.model.model_config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from moe_ray.model.families import Layout, Weight


def rotary_pairs(config: ModelConfig, layout: Layout, weight: Weight) -> RotaryPairs | None:
    """Where the pairs of a weight lie side by side in a checkpoint of this layout; None: they do not."""
    latent = config.latent
    if latent is not None:
        if not latent.interleaved or weight.role not in ("q", "q_b", "kv_a"):
            return None
        return RotaryPairs(1 if weight.role == "kv_a" else config.num_attention_heads, latent.rope)
    if not layout.interleaved or weight.role not in ("q", "k"):
        return None
    heads = config.num_attention_heads if weight.role == "q" else config.num_key_value_heads
    return RotaryPairs(heads, config.head_dim)


def pairs_in_halves(rows: np.ndarray, pairs: RotaryPairs) -> np.ndarray:
    """[heads * R, …], each head's last 2 P rows being pairs → the same, the first ones of these before the second ones.

    The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py, and `permute` of transformers'
    convert_mistral_weights_to_hf.py; where not all rows of a head are pairs, `apply_rotary_pos_emb_interleave` of its
    modeling_deepseek_v3.py. Rows are moved as they are, so they may be of codes.
    """
    by_head = rows.reshape(pairs.heads, -1, *rows.shape[1:])
    ordered = by_head.copy()
    turned = by_head[:, -pairs.rows :]
    halves = turned.reshape(pairs.heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2)
    ordered[:, -pairs.rows :] = halves.reshape(turned.shape)
    return ordered.reshape(rows.shape)


def codes_in_halves(codes: GroupedCodes, pairs: RotaryPairs) -> GroupedCodes:
    """The same of quantised rows."""
    return replace(
        codes,
        codes=pairs_in_halves(codes.codes, pairs),
        scales=pairs_in_halves(codes.scales, pairs),
        offsets=None if codes.offsets is None else pairs_in_halves(codes.offsets, pairs),
    )
