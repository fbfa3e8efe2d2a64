"""What `moe-ray plan --variant` says: experts that are equal count once, a trunk for each model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from variant_models import save_variant

from moe_ray.commands.main import app
from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.deploy.variants import variants_of
from moe_ray.errors import ConfigError
from moe_ray.llm import LLM

LAYERS, EXPERT = 4, 3 * 64 * 112
"""Of the random model: layers, and the weights of one expert in one."""


@pytest.fixture(scope="module")
def tuned(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("variants") / "tuned"
    return save_variant(random_model, directory, lambda key: None if key[1] in (2, 5) else key[1])


def test_equal_experts_count_once(random_model: Path, tuned: Path, tmp_path: Path) -> None:
    arguments = ["plan", "--model", str(random_model), "--variant", f"tuned={tuned}", "--dtype", "float32", "--json"]
    done = CliRunner().invoke(app, arguments, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    held = {row["actor"]: row["weight_bytes"] for row in said["rows"]}
    trunk, one = held["Trunk"], 4 * LAYERS * EXPERT
    assert list(held)[:3] == ["Trunk", "Trunk-tuned", "Expert0"]
    assert held["Trunk-tuned"] == trunk
    assert [held[f"Expert{e}"] for e in range(8)] == [one, one, 2 * one, one, one, 2 * one, one, one]
    assert {row["actor"]: row["read_bytes"] for row in said["rows"]} == held
    shared = said["variants"]
    assert shared["alone_bytes"] == trunk + 8 * one
    assert shared["added_expert_bytes"] == 2 * one
    assert shared["shared_bytes"] == 6 * one
    assert shared["total_bytes"] == said["total_weight_bytes"] == 2 * trunk + 10 * one
    assert shared["separate_bytes"] == 2 * (trunk + 8 * one)


def test_quantised_experts_are_counted_in_their_bits(random_model: Path, tuned: Path, tmp_path: Path) -> None:
    flags = {
        "model": {"path": str(random_model), "dtype": "float32"},
        "variants": [{"name": "tuned", "path": str(tuned)}],
        "experts": {"quantize": "int8"},
        "cache_dir": tmp_path,
    }
    made = planned(load_config(flags), random_model)
    held = {actor.name: actor for actor in made.plan.actors}
    assert held["Expert2"].weight_bytes == 2 * held["Expert3"].weight_bytes
    assert held["Expert2"].held_as == held["Expert3"].held_as == ("int8",)
    assert made.shared is not None
    assert made.shared.shared_bytes == 6 * held["Expert3"].weight_bytes


def test_an_expert_of_another_number_is_the_same_only_in_the_same_bits(random_model: Path, tmp_path: Path) -> None:
    """Served alone, the variant's expert 0 would be quantised; as the first model's expert 1 it would not."""
    swapped = save_variant(random_model, tmp_path / "swapped", lambda key: key[1] ^ 1)
    flags = {
        "model": {"path": str(random_model), "dtype": "float32"},
        "variants": [{"name": "swapped", "path": str(swapped)}],
        "cache_dir": tmp_path,
    }
    (alike,) = variants_of(load_config(flags))
    assert alike.numbers.table == ((1, 0, 3, 2, 5, 4, 7, 6),) * LAYERS
    (unlike,) = variants_of(load_config({**flags, "experts": {"overrides": {0: {"quantize": "int8"}}}}))
    assert unlike.numbers.table == ((8, 9, 3, 2, 5, 4, 7, 6),) * LAYERS


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"transport": "local"},
            r"`variants`: experts in the trunk's own process \(`transport: local`\) are not shared",
        ),
        ({"model": {"served_name": "tuned"}}, r"`variants`: 'tuned' is the name of another model"),
        ({"adapters": {"modules": {"tuned": "/x"}}}, r"'tuned' is the name of another model or adapter"),
        ({"variants": [{"name": "a/b", "path": "x"}]}, r"variants.0.name"),
        ({"variants": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, r"'a' is the name of another model"),
        ({"variants": [{"name": f"v{i}", "path": "x"} for i in range(16)]}, r"at most 15"),
    ],
)
def test_variants_that_cannot_be_served_are_refused(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config({"variants": [{"name": "tuned", "path": "x"}], **flags})


def test_one_process_serves_one_model(random_model: Path) -> None:
    with pytest.raises(ConfigError, match="`variants`: several models share experts in a server"):
        LLM(random_model, variants=[{"name": "tuned", "path": "x"}])
