"""Checkpoints of a config.json alone: every weight is there, of the right shape and size, and computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_mixtral import TOKENIZER

from moe_ray.config import load_config
from moe_ray.convert.dummy import STD, dummy_checkpoint
from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError
from moe_ray.hub import resolve_model
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.weights import weights_of_expert, weights_of_model, weights_of_trunk

SHAPE: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 49152,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def config_file(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps({**SHAPE, **changes}))
    return path


def gptq(bits: int) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": False}


def test_floats_are_as_initialised(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(dummy_checkpoint(config_file(tmp_path / "m"), tmp_path / "cache"))
    norm = checkpoint.read_values(Weight("input_norm", (128,), 2)).astype(np.float32)
    assert (norm == 1).all()
    gate = checkpoint.read_values(weights_of_expert(checkpoint.config, 1, 3)[0])
    assert gate.dtype.name == "bfloat16"
    values = gate.astype(np.float32)
    assert abs(values.std() - STD) < 0.02 * STD
    assert abs(values.mean()) < 0.05 * STD
    assert len(np.unique(values, axis=0)) == len(values), "no two rows of a matrix are equal"


def test_experts_differ_and_the_file_is_small(tmp_path: Path) -> None:
    directory = dummy_checkpoint(config_file(tmp_path / "m", num_hidden_layers=40), tmp_path / "cache")
    checkpoint = Checkpoint.open(directory)
    ups = [checkpoint.read_values(weights_of_expert(checkpoint.config, 0, e)[1]).tobytes() for e in range(8)]
    assert len(set(ups)) == 8
    whole = checkpoint.check(weights_of_model(checkpoint.config))
    assert whole == sum(2 * weight.numel for weight in weights_of_model(checkpoint.config)), "as large as it would be"
    assert (directory / "model.safetensors").stat().st_size < 2 * 49152 * 128 + 128 * 2**20


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_gptq(tmp_path: Path, bits: int) -> None:
    where = config_file(tmp_path / "m", quantization_config=gptq(bits))
    checkpoint = Checkpoint.open(dummy_checkpoint(where, tmp_path / "cache"))
    matrix = checkpoint.matrix(weights_of_expert(checkpoint.config, 2, 7)[2])
    assert matrix.grouping is not None
    assert (matrix.grouping.bits, matrix.grouping.group, matrix.grouping.offsets) == (bits, 64, False)
    assert abs(matrix.values().std() - STD) < 0.05 * STD
    by_role = {weight.role: checkpoint.find(weight).format for weight in weights_of_trunk(checkpoint.config)}
    assert (by_role["q"], by_role["router"], by_role["head"]) == ("gptq", "bfloat16", "bfloat16")


@pytest.mark.slow
def test_a_model_of_a_config_and_a_tokenizer_answers(tmp_path: Path, demo_model: Path) -> None:
    directory = config_file(tmp_path / "m").parent
    for name in TOKENIZER:
        (directory / name).symlink_to(demo_model / name)
    llm = LLM(directory, load_format="dummy", cache_dir=str(tmp_path / "cache"))
    (answer,) = llm.generate(["Once"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert len(answer.token_ids) == 5
    again = LLM(directory, load_format="dummy", cache_dir=str(tmp_path / "cache"))
    assert again.generate(["Once"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0] == answer
    assert len([path for path in (tmp_path / "cache" / "dummy").iterdir() if path.is_dir()]) == 1


def test_what_a_directory_has_beside_weights_is_there(tmp_path: Path) -> None:
    directory = config_file(tmp_path / "m").parent
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-1.safetensors",
    ):
        (directory / name).write_text("{}")
    config = load_config({"model": {"path": str(directory), "load_format": "dummy"}, "cache_dir": str(tmp_path / "c")})
    made = resolve_model(config)
    names = {path.name for path in made.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    other = resolve_model(
        load_config(
            {
                "model": {
                    "path": str(directory / "config.json"),
                    "load_format": "dummy",
                    "hf_overrides": {"max_position_embeddings": 64},
                },
                "cache_dir": str(tmp_path / "c"),
            }
        )
    )
    assert Checkpoint.open(other).config.max_position_embeddings == 64


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    for quantization, says in (
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "floats, or codes as GPTQ stores them"),
        ({**gptq(3)}, "bits 3; dummy weights have 4 or 8"),
        ({**gptq(4), "group_size": 48}, "in groups of 48"),
    ):
        where = config_file(tmp_path / "m", quantization_config=quantization)
        with pytest.raises(CheckpointError, match=says):
            dummy_checkpoint(where, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="int7"):
        dummy_checkpoint(config_file(tmp_path / "m", torch_dtype="int7"), tmp_path / "cache")
