"""A small model whose kernels are compiled before a process starts, and how it is held."""

from __future__ import annotations

SMALL = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "sliding_window": 128,
}
