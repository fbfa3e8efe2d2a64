"""Small models whose steps are padded as on a card, and the blocks of their caches."""

from __future__ import annotations

import torch

from moe_ray.model.model_config import ModelConfig

CPU, BLOCK = torch.device("cpu"), 4
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": 40,
    }
)
SINKS = ModelConfig.from_dict({**CONFIG.raw, "model_type": "gpt_oss", "head_dim": 16, "num_experts_per_tok": 2})
"""With a window in the first and the last layer only."""
