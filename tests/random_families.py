"""A small random model of every family that is served, as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

SHAPE: Final = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": None,
}
MIXTURE: Final = {"num_experts": 6, "num_experts_per_tok": 3}
LOCAL: Final = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 96}
LONGROPE: Final = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.5 * i for i in range(16)],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 128,
}

CASES: Final[dict[str, dict[str, Any]]] = {
    "qwen3_moe": {**MIXTURE, "moe_intermediate_size": 32, "head_dim": 64, "norm_topk_prob": True},
    "qwen3_moe, biases, not renormalised": {**MIXTURE, "moe_intermediate_size": 32, "attention_bias": True},
    "qwen2_moe": {**MIXTURE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "qwen2_moe, renormalised, no biases": {
        **MIXTURE,
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
        **{"norm_topk_prob": True, "qkv_bias": False},
    },
    "olmoe": {**MIXTURE, "intermediate_size": 96},
    "granitemoe": {
        **LOCAL,
        **{"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        "tie_word_embeddings": True,
    },
    "phimoe": {**LOCAL, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "phimoe, longrope": {
        **LOCAL,
        **{"num_experts_per_tok": 2, "rope_parameters": LONGROPE, "router_jitter_noise": 0.3},
    },
    "llama": {"intermediate_size": 96, "attention_bias": True},
    "qwen2": {"intermediate_size": 96, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 96, "head_dim": 64},
    "mistral": {"intermediate_size": 96, "sliding_window": 24},
}
"""model_type, and after a comma what is special about it → what its config has beside `SHAPE`."""


def save_random_family(directory: Path, case: str, **changes: Any) -> Path:
    """Write the random model of one of `CASES`, with `changes`, in float32 into `directory`; no tokenizer.

    What transformers makes as zeros or ones, biases and norms, is random, too.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    config = AutoConfig.for_model(case.partition(",")[0], **{**SHAPE, **CASES[case], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory
