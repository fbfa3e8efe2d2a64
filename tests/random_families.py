"""A small random model of every family that is served, as transformers saves it."""

from __future__ import annotations

import json
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

PLAIN: Final = {"rope_type": "default", "rope_theta": 1e4}
YARN: Final = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32.0, "beta_slow": 1.0},
}
LATENT: Final = {
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "intermediate_size": 160},
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
    "olmoe, clipped": {**MIXTURE, "intermediate_size": 96, "clip_qkv": 0.9},
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
    "gpt_oss": {**LOCAL, "head_dim": 32, "sliding_window": 12, "swiglu_limit": 1.5},
    "qwen3_moe, layers without experts": {
        **{**MIXTURE, "moe_intermediate_size": 32, "head_dim": 64, "intermediate_size": 160},
        **{"num_hidden_layers": 4, "mlp_only_layers": [2], "decoder_sparse_step": 2},
    },
    "qwen2_moe, layers without experts": {
        **{**MIXTURE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "intermediate_size": 160},
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {
        **LATENT,
        **{"q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v2, by groups": {
        **LATENT,
        **{"q_lora_rank": 64, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0},
        **{"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0, "rope_parameters": PLAIN},
    },
    "deepseek_v3": {
        **LATENT,
        **{"q_lora_rank": 64, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
        **{"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}, "num_hidden_layers": 3},
    },
    "deepseek_v3, in halves, one group, many heads": {
        **{**LATENT, "num_attention_heads": 32, "num_key_value_heads": 32},
        **{"q_lora_rank": None, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        **{"norm_topk_prob": False, "rope_interleave": False, "rope_parameters": PLAIN},
    },
    "llama": {"intermediate_size": 96, "attention_bias": True},
    "qwen2": {"intermediate_size": 96, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 96, "head_dim": 64},
    "mistral": {"intermediate_size": 96, "sliding_window": 24},
}
"""model_type, and after a comma what is special about it → what its config has beside `SHAPE`."""


def save_random_family(directory: Path, case: str, **changes: Any) -> Path:
    """Write the random model of one of `CASES`, with `changes`, in float32 into `directory`; no tokenizer.

    What transformers makes as zeros or ones, biases and norms, is random, too, and sinks are large enough to count.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    config = AutoConfig.for_model(case.partition(",")[0], **{**SHAPE, **CASES[case], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("sinks"):
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return directory


def save_random_gpt_oss(floats: Path, directory: Path) -> Path:
    """Write a gpt-oss as it is published, experts' matrices in MXFP4, to `directory`; their values to `floats`."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_random_family(floats, "gpt_oss")
    random, file = torch.Generator().manual_seed(3), "model.safetensors"
    tensors, kept = load_file(floats / file), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random).to(torch.uint8)
        scales = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=random).to(torch.uint8)
        kept |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, floats / file, {"format": "pt"})
    others = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in kept}
    save_file({**others, **kept}, directory / file)
    raw = json.loads((floats / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    return directory
