"""The plan of Mixtral-8x7B in numbers that stand in its paper and on its model card, and the logic of what fits."""

from __future__ import annotations

import math

import pytest

from moe_ray.model.model_config import ModelConfig
from moe_ray.plan import ActorPlan, Plan, make_plan

MIXTRAL_8X7B = {  # mistralai/Mixtral-8x7B-v0.1, config.json
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
GB = 10**9


def mixtral(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**MIXTRAL_8X7B, **changes})


def test_mixtral_8x7b_at_16_bits() -> None:
    plan = make_plan(mixtral(), "float16")
    trunk, *experts = plan.actors
    assert [actor.name for actor in plan.actors] == ["Trunk", *(f"Expert{i}" for i in range(8))]
    assert sum(actor.parameters for actor in plan.actors) == 46_702_792_704  # what transformers counts
    assert {actor.weight_bytes for actor in experts} == {32 * 3 * 4096 * 14336 * 2}
    assert round(experts[0].weight_bytes / GB, 2) == 11.27
    assert round(trunk.weight_bytes / GB, 2) == 3.21
    assert round(plan.total_bytes / GB, 1) == 93.4
    assert plan.kv_bytes_per_token == 131_072
    assert plan.context == 32768


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 2), ("bfloat16", 1), ("float16", 1)])
def test_bytes_follow_the_dtype(dtype: str, factor: int) -> None:
    half, plan = make_plan(mixtral(), "float16"), make_plan(mixtral(), dtype)
    assert plan.total_bytes == factor * half.total_bytes
    assert plan.kv_bytes_per_token == factor * half.kv_bytes_per_token
    assert [a.parameters for a in plan.actors] == [a.parameters for a in half.actors]


def test_the_plan_is_what_transformers_allocates() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    for changes in ({}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"num_local_experts": 3}):
        small = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            **changes,
        }
        model = MixtralForCausalLM(MixtralConfig(**small))
        plan = make_plan(mixtral(**small), "float32")
        assert sum(actor.parameters for actor in plan.actors) == model.num_parameters()


def test_what_fits_a_card() -> None:
    plan = make_plan(mixtral(), "float16")
    rows = plan.fits(16 * 2**30)
    assert all(ok for _, ok, _ in rows)
    trunk, _, tokens = rows[0]
    assert trunk.name == "Trunk"
    assert tokens == (math.floor(0.9 * 16 * 2**30) - trunk.weight_bytes) // 131_072
    assert {tokens for _, _, tokens in rows[1:]} == {0}, "experts hold no KV cache"
    assert [ok for _, ok, _ in plan.fits(11 * 2**30)] == [True] + [False] * 8


def test_fits_at_the_very_edge() -> None:
    plan = Plan("float16", (ActorPlan("Trunk", 50, 100), ActorPlan("Expert0", 60, 120)), 10, 64)
    assert [row[1:] for row in plan.fits(120, reserve=0)] == [(True, 2), (True, 0)]
    assert [row[1:] for row in plan.fits(119, reserve=0)] == [(True, 1), (False, 0)]
    assert [row[1:] for row in plan.fits(109, reserve=0)] == [(False, 0), (False, 0)], (
        "a trunk without KV serves nobody"
    )
    assert [row[1:] for row in plan.fits(99, reserve=0)] == [(False, 0), (False, 0)]
    assert [row[1:] for row in plan.fits(240, reserve=0.5)] == [(True, 2), (True, 0)]
