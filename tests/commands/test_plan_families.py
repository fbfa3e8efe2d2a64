"""The plans of published models of every family: their sizes are those on their cards, their experts in groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.experts.planning.placement import experts_in

QWEN: Final = {
    **{"bos_token_id": 151643, "eos_token_id": 151645, "attention_dropout": 0.0, "decoder_sparse_step": 1},
    **{"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "output_router_logits": False},
    **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
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
    "Mistral-7B-v0.1": {
        **{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2},
        **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05},
        **{"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        "vocab_size": 32000,
    },
}
"""Their config.json."""
PUBLISHED: Final = {  # billions of parameters by the model card, and how experts are grouped
    "Qwen3-30B-A3B": (30.5, 16, 8),
    "Qwen1.5-MoE-A2.7B": (14.3, 15, 4),
    "OLMoE-1B-7B-0924": (6.9, 16, 4),
    "granite-3.1-3b-a800m": (3.3, 14, 3),
    "Phi-3.5-MoE-instruct": (41.9, 16, 1),
    "Mixtral-8x22B-v0.1": (140.6, 8, 1),
    "Llama-3.1-8B": (8.0, 1, 1),
    "Mistral-7B-v0.1": (7.2, 1, 1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_of_a_published_model(name: str, tmp_path: Path) -> None:
    billions, actors, each = PUBLISHED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]))
    made = planned(load_config({"model": {"path": str(file)}}), file, without_weights=True)
    assert round(made.plan.total_parameters / 1e9, 1) == billions
    trunk, *experts = made.plan.actors
    assert (len(experts), made.experts_per_actor) == (actors, each)
    held = [expert for actor in experts for expert in experts_in(actor.name)]
    assert held == list(range(made.model.num_local_experts))
    assert sum(actor.parameters for actor in experts) + trunk.parameters == made.plan.total_parameters
    said = CliRunner().invoke(app, ["plan", "--model", str(file)])
    assert said.exit_code == 0, said.output
    assert f"{made.plan.total_parameters / 1e9:.2f} B parameters" in said.output


def test_groups_can_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"]))
    settings = {"model": {"path": str(file)}, "experts": {"experts_per_actor": 64}}
    made = planned(load_config(settings), file, without_weights=True)
    assert [actor.name for actor in made.plan.actors] == ["Trunk", "Experts0-63", "Experts64-127"]
