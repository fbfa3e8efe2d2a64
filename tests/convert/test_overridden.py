"""Overrides of config.json: what becomes of the file, what is refused, and who sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, load_config
from moe_ray.convert.overridden import merged_config
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.hub import resolve_config, resolve_draft, resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.model_config import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
RAW: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OLD, NEW = {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
"""The two spellings of one file."""


def merged(overrides: dict[str, Any], raw: dict[str, Any] = OLD) -> ModelConfig:
    return ModelConfig.from_dict(merged_config({**RAW, **raw}, overrides, "there/config.json"))


def configured(path: Path, cache: Path, overrides: object, **more: Any) -> Config:
    return load_config({"model": {"path": str(path), "hf_overrides": overrides}, "cache_dir": str(cache), **more})


@pytest.mark.parametrize("raw", [OLD, NEW], ids=["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_embeddings_in_either_spelling(raw: dict[str, Any], key: str) -> None:
    config = merged({key: YARN}, raw)
    assert (config.rope_type, config.rope_theta) == ("yarn", 5e5)
    assert config.max_position_embeddings == 256
    assert config.raw["rope_parameters"]["factor"] == 4.0
    assert merged({key: {**YARN, "rope_theta": 1e6}}, raw).rope_theta == 1e6
    assert merged({key: YARN, "rope_theta": 2e6}, raw).rope_theta == 2e6
    assert merged({"rope_theta": 3e6}, raw).rope_theta == 3e6
    scaled = merged_config({**RAW, **raw}, {key: YARN}, "there")
    back = ModelConfig.from_dict(merged_config(scaled, {key: None, "max_position_embeddings": 128}, "there"))
    assert (back.rope_type, back.rope_theta, back.max_position_embeddings) == ("default", 5e5, 128)


def test_how_long_contexts_become() -> None:
    without = {"rope_type": "yarn", "factor": 4.0}
    config = merged({"rope_scaling": without})
    assert config.max_position_embeddings == 512
    assert config.raw["rope_parameters"]["original_max_position_embeddings"] == 128, "not what it is now"
    assert merged({"rope_scaling": {"type": "linear", "factor": 2}}).max_position_embeddings == 256
    assert merged({"rope_scaling": {**YARN, "factor": 1.5}}).max_position_embeddings == 128, "never shorter"
    assert merged({"rope_scaling": YARN, "max_position_embeddings": 200}).max_position_embeddings == 200
    assert merged({"max_position_embeddings": 300}).max_position_embeddings == 300


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"rope_scalling": YARN}, ConfigError, "nothing reads 'rope_scalling' of a mixtral model's config.json"),
        ({"attention_dropout": 0.1}, ConfigError, "nothing reads 'attention_dropout'"),
        ({"rope_scaling": 4}, ConfigError, "`rope_scaling` must be an object or null, got 4"),
        ({"num_experts_per_tok": 9}, CheckpointError, "num_experts_per_tok 9 exceeds num_local_experts 8"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, CheckpointError, "rope_type 'dynamic' is not supported"),
        ({"attention_bias": True}, CheckpointError, "`attention_bias` is True"),
        ({"model_type": "bert"}, CheckpointError, "there/config.json with model.hf_overrides: model_type is 'bert'"),
        ({"hidden_size": "wide"}, CheckpointError, "`hidden_size` must be a positive integer, found 'wide'"),
    ],
)
def test_what_is_refused(overrides: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        merged(overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ['{"rope_scaling": ', "[1]", "yarn"])
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`model\.hf_overrides`: .*must be a JSON object"):
        load_config({"model": {"hf_overrides": text}})


def test_everything_that_reads_the_directory_sees_them(random_model: Path, tmp_path: Path) -> None:
    overrides = {"rope_scaling": YARN, "sliding_window": None, "eos_token_id": 7}
    config = configured(random_model, tmp_path, json.dumps(overrides))
    assert config.model.hf_overrides == overrides
    directory = resolve_model(config)
    assert directory.is_relative_to(tmp_path)
    checkpoint, source = Checkpoint.open(directory), Checkpoint.open(random_model)
    assert (checkpoint.config.rope_type, source.config.rope_type) == ("yarn", "default")
    assert checkpoint.files == source.files
    written = json.loads((directory / "config.json").read_text())
    assert written["eos_token_id"] == 7
    assert resolve_model(configured(random_model, tmp_path, overrides)) == directory, "made once"
    assert resolve_model(configured(random_model, tmp_path, {})) == random_model
    assert resolve_model(configured(random_model, tmp_path, {"eos_token_id": 8})) != directory
    assert config.served_name == random_model.name


def test_of_a_config_json_alone(random_model: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.json"
    alone.write_text((random_model / "config.json").read_text())
    file = resolve_config(configured(alone, tmp_path, {"rope_scaling": YARN}))
    assert ModelConfig.read(file).rope_type == "yarn"


def test_variants_and_draft_models_are_read_as_they_are(random_model: Path, tmp_path: Path) -> None:
    config = configured(
        random_model,
        tmp_path,
        {"rope_scaling": YARN},
        variants=[{"name": "other", "path": str(random_model)}],
        engine={"draft_model": str(random_model), "speculative": "auto"},
    )
    (variant,) = config.for_variants
    assert resolve_model(variant) == resolve_draft(config) == random_model
    assert resolve_model(config) != random_model
