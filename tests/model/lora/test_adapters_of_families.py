"""Adapters of models that are no Mixtrals: modules of other names, and biases, norms and factors beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import ATTENTION, AdaptedModel, peft_logits, save_adapter
from backends import open_backend
from random_families import CASES, save_random_family

from moe_ray.errors import AdapterError

PROMPTS = [[(7 * i + 3 * j + j * j) % 96 for j in range(9 + i)] for i in range(4)]
OUTPUT = 5
EXPERTS = {"granitemoe": "block_sparse_moe.experts", **dict.fromkeys(CASES, "mlp.experts")}
ROUTERS: dict[str, list[str]] = {
    "granitemoe": ["block_sparse_moe.router.weight"],
    "gpt_oss": ["mlp.router.weight"],
    "phimoe": [],
}
"""As parameters. Phi's is a module that returns more than logits, and peft fails to compute what it adds to it."""
DENSE = ("llama", "mistral", "qwen2", "qwen3")


def ways(case: str) -> list[dict[str, Any]]:
    """Of peft's LoraConfig: on attention; on everything that is adapted."""
    family = case.partition(",")[0]
    attention = {"r": 8, "target_modules": ATTENTION}
    if family in DENSE:
        return [attention, {"r": 5, "target_modules": "all-linear"}]
    stacks = [f"{EXPERTS[family]}.{name}" for name in ("gate_up_proj", "down_proj")]
    parameters = [*stacks, *ROUTERS.get(family, ["mlp.gate.weight"])]
    modules: Any = ATTENTION if family == "phimoe" else "all-linear"
    if family.startswith("deepseek"):
        attention = {"r": 8, "target_modules": ["o_proj"]}
        modules = ["o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    everything = {"r": 5, "target_modules": modules, "target_parameters": parameters}
    if family == "qwen2_moe":
        only = {"r": 18, "target_modules": ["shared_expert.up_proj", "shared_expert_gate"]}
        return [attention, everything, only]
    return [attention, everything]


BY_TORCH = ("phimoe", "phimoe, longrope", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, "native float32") for case in CASES if not case.startswith("phimoe")),
        *((case, "torch float32") for case in BY_TORCH),
    ],
)
def test_as_peft_computes_them(case: str, backend: str, tmp_path: Path) -> None:
    base = save_random_family(tmp_path / "base", case)
    model = AdaptedModel(base, open_backend(backend))
    of: dict[int, Path | None] = {0: None}
    for seed, config in enumerate(ways(case)):
        directory = save_adapter(base, tmp_path / str(seed), seed, **config)
        of[model.add(directory).adapter_id] = directory
    order = sorted(of)
    generated = model.generate(list(zip(order, PROMPTS, strict=False)), OUTPUT)
    computed = model.logits(list(zip(order, generated, strict=True)))
    for number, tokens, logits in zip(order, generated, computed, strict=True):
        expected = peft_logits(base, of[number], tokens)
        if number:
            assert (expected - peft_logits(base, None, tokens)).abs().max() > 0.1, "it changes something"
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert expected.argmax(-1)[-OUTPUT - 1 : -1].tolist() == tokens[-OUTPUT:]
    for number in order[1:]:
        model.trunk.remove_adapter(number)
    assert not model.trunk.adapter_bytes


def test_what_brings_states_to_latents_takes_no_addition(tmp_path: Path) -> None:
    base = save_random_family(tmp_path / "base", "deepseek_v3")
    model = AdaptedModel(base, open_backend("torch float32"))
    for number, module in enumerate(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")):
        directory = save_adapter(base, tmp_path / module, number, r=4, target_modules=[module])
        with pytest.raises(AdapterError, match=f"nothing can be added to .*{module}"):
            model.add(directory)


def test_queries_without_latents_take_none_either(tmp_path: Path) -> None:
    base = save_random_family(tmp_path / "base", "deepseek_v2")
    model = AdaptedModel(base, open_backend("torch float32"))
    directory = save_adapter(base, tmp_path / "adapter", 0, r=4, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"nothing can be added to model\.layers\.0\.self_attn\.q_proj"):
        model.add(directory)
