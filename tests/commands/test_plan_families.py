"""The plans of published models of every family: their sizes are those on their cards, their experts in groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
from published_configs import CONFIGS
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.experts.planning.placement import experts_in
from moe_ray.model.compute.resolve import Machine, Wanted, resolve
from moe_ray.model.kv_bytes import kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.build import KERNELS

PUBLISHED: Final = {  # billions of parameters by the model card, and how experts are grouped
    "Qwen3-30B-A3B": (30.5, 16, 8),
    "Qwen1.5-MoE-A2.7B": (14.3, 15, 4),
    "OLMoE-1B-7B-0924": (6.9, 16, 4),
    "granite-3.1-3b-a800m": (3.3, 14, 3),
    "Phi-3.5-MoE-instruct": (41.9, 16, 1),
    "Mixtral-8x22B-v0.1": (140.6, 8, 1),
    "gpt-oss-20b": (20.9, 16, 2),
    "gpt-oss-120b": (116.8, 16, 8),
    "DeepSeek-V2-Lite": (15.7, 16, 4),
    "DeepSeek-V2": (235.7, 16, 10),
    "DeepSeek-V3": (671.0, 16, 16),
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


@pytest.mark.parametrize(("name", "layers", "experts"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)])
def test_what_gpt_oss_takes_by_its_config_alone(name: str, layers: int, experts: int, tmp_path: Path) -> None:
    """Experts in MXFP4, 4 bits a weight and a scale of 2 bytes for each 32; the trunk and all biases in bfloat16."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]))
    said = CliRunner().invoke(app, ["plan", "--model", str(file), "--dtype", "bfloat16", "--json"])
    assert said.exit_code == 0, said.output
    plan = json.loads(said.stdout)
    matrices, biases = 3 * 2880 * 2880, 3 * 2880
    trunk, *actors = plan["rows"]
    assert sum(actor["weight_bytes"] for actor in actors) == layers * experts * (matrices * 9 // 16 + 2 * biases)
    heads, kv = 64 * 64, 8 * 64
    layer = 2880 * (2 * heads + 2 * kv) + heads + 2 * kv + 2880 + 64 + 2 * 2880 + experts * 2881
    assert trunk["weight_bytes"] == 2 * (layers * layer + 2 * 201088 * 2880 + 2880)
    assert plan["unseen_quantization"] is None
    assert all(actor["held_as"] == ["mxfp4"] for actor in actors)
    assert plan["kv_bytes_per_token"] == 2 * layers * kv * 2


def test_what_deepseeks_cache_takes() -> None:
    """One latent and one rotated key of a token in a layer, not keys and values of every head."""
    for name, layers in (("DeepSeek-V2-Lite", 27), ("DeepSeek-V3", 61)):
        model = ModelConfig.from_dict(CONFIGS[name])
        assert kv_bytes_per_token(model, "bfloat16") == layers * (512 + 64) * 2
        assert kv_bytes_per_token(model, "int8") == layers * (512 + 64 + 4)
    lite = resolve(ModelConfig.from_dict(CONFIGS["DeepSeek-V2-Lite"]), Wanted(), Machine(KERNELS["avx2"].needs))
    assert (lite.trunk, lite.experts) == ("native", "native")


def test_groups_can_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["Qwen3-30B-A3B"]))
    settings = {"model": {"path": str(file)}, "experts": {"experts_per_actor": 64}}
    made = planned(load_config(settings), file, without_weights=True)
    assert [actor.name for actor in made.plan.actors] == ["Trunk", "Experts0-63", "Experts64-127"]
