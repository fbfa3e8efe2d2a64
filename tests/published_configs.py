"""config.json of published models of every family."""

from __future__ import annotations

from typing import Any, Final

QWEN: Final = {
    **{"bos_token_id": 151643, "eos_token_id": 151645, "attention_dropout": 0.0, "decoder_sparse_step": 1},
    **{"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "output_router_logits": False},
    **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
}
GPT_OSS: Final = {
    **{
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
    },
    **{"eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880},
    **{"initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880},
    **{"max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4},
    **{"num_key_value_heads": 8, "output_router_logits": False, "pad_token_id": 199999, "rms_norm_eps": 1e-05},
    "quantization_config": {
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
        ],
        "quant_method": "mxfp4",
    },
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    **{"rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0},
    **{"tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088},
}
DEEPSEEK: Final = {
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "hidden_act": "silu"},
    **{"initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1},
    **{"pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06},
    **{"rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"use_cache": True, "v_head_dim": 128},
}
DEEPSEEK_ROPE: Final = {
    **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"},
    **{"mscale": 0.707, "mscale_all_dim": 0.707},
}
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": {
        **QWEN,
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "transformers_version": "4.51.0"},
        **{"attention_bias": False, "head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40960},
        **{"max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48},
        **{"num_key_value_heads": 4, "rope_scaling": None, "sliding_window": None},
    },
    "Qwen1.5-MoE-A2.7B": {
        **QWEN,
        **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "intermediate_size": 5632},
        **{"max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408},
        **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
        **{"num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
        **{"sliding_window": 32768},
    },
    "OLMoE-1B-7B-0924": {
        **{"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None},
        **{"eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024},
        **{"max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 1},
        **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False},
        **{"torch_dtype": "bfloat16", "vocab_size": 50304},
    },
    "granite-3.1-3b-a800m": {
        **{"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_bias": False},
        **{"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 6.0},
        **{"residual_multiplier": 0.22, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu"},
        **{"hidden_size": 1536, "intermediate_size": 512, "max_position_embeddings": 131072},
        **{"num_attention_heads": 24, "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"num_local_experts": 40, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000.0},
        **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49155},
    },
    "Phi-3.5-MoE-instruct": {
        **{"architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": True},
        **{"auto_map": {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"}, "bos_token_id": 1},
        **{"eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 4096, "hidden_dropout": 0.0},
        **{"input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True},
        **{"max_position_embeddings": 131072, "num_attention_heads": 32, "num_experts_per_tok": 2},
        **{"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16, "rms_norm_eps": 1e-05},
        "original_max_position_embeddings": 4096,
        "rope_scaling": {  # the lists are longer than 1.0 in the file; nothing here computes with them
            **{"long_factor": [1.0] * 64, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096},
            **{"short_factor": [1.0] * 64, "short_mscale": 1.243163121016122, "type": "longrope"},
        },
        **{"rope_theta": 10000.0, "router_jitter_noise": 0.01, "sliding_window": 131072},
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064},
    },
    "Mixtral-8x22B-v0.1": {
        **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2},
        **{"hidden_act": "silu", "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536},
        **{"num_attention_heads": 48, "num_experts_per_tok": 2, "num_hidden_layers": 56, "num_key_value_heads": 8},
        **{"num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "sliding_window": None},
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000},
    },
    "gpt-oss-20b": {
        **GPT_OSS,
        **{"layer_types": ["sliding_attention", "full_attention"] * 12, "num_hidden_layers": 24},
        "num_local_experts": 32,
    },
    "gpt-oss-120b": {
        **GPT_OSS,
        **{"layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36},
        "num_local_experts": 128,
    },
    "Llama-3.1-8B": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False},
        **{"bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096},
        **{"intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32},
        **{"num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
        **{"rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256},
    },
    "DeepSeek-V2-Lite": {
        **DEEPSEEK,
        **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000},
        **{"eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944},
        **{"moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27},
        **{"num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": DEEPSEEK_ROPE, "routed_scaling_factor": 1.0},
        **{"scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400},
    },
    "DeepSeek-V2": {
        **DEEPSEEK,
        **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000},
        **{"eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12288},
        **{"moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2},
        **{"norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60},
        **{"num_key_value_heads": 128, "q_lora_rank": 1536, "rope_scaling": DEEPSEEK_ROPE},
        **{"routed_scaling_factor": 16.0, "scoring_func": "softmax", "topk_group": 3},
        **{"topk_method": "group_limited_greedy", "vocab_size": 102400},
    },
    "DeepSeek-V3": {
        **DEEPSEEK,
        **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 0},
        **{"eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168},
        **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256},
        **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8},
        **{"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536},
        "quantization_config": {
            **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        "rope_scaling": {**DEEPSEEK_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
        **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc"},
        "vocab_size": 129280,
    },
    "Mistral-7B-v0.1": {
        **{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2},
        **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05},
        **{"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        "vocab_size": 32000,
    },
}
"""Their config.json."""
