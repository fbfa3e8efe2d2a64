"""Mistral's own files, consolidated*.safetensors and params.json, are the model that transformers saves its own way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import config_of
from safetensors.torch import load_file, save_file

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import CONSOLIDATED_INDEX, SINGLE
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus
from moe_ray.model.weights import weights_of_model

Tensors = dict[str, torch.Tensor]
NAMES = (  # Hugging Face's → Mistral's, the other way round than transformers' conversion had them
    (r"^model\.embed_tokens", "tok_embeddings"),
    (r"^lm_head", "output"),
    (r"^model\.", ""),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 4,
    "head_dim": 8,
    "hidden_dim": 112,
    "n_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 1000000.0,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in halves → in pairs, the inverse of `permute` in transformers' convert_mistral_weights_to_hf.py."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def mistral_tensors(source: Path, block: str = "feed_forward") -> Tensors:
    config = config_of(source)
    renamed: Tensors = {}
    for name, tensor in load_file(source / SINGLE).items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for part, count in heads.items():
            if part in name:
                tensor = interleaved(tensor, count)
        for pattern, theirs in NAMES:
            name = re.sub(pattern, theirs, name)
        renamed[name.replace("block_sparse_moe", block)] = tensor.contiguous()
    return renamed


def params_of(source: Path, **changes: Any) -> dict[str, Any]:
    config = config_of(source)
    return {**PARAMS, "n_kv_heads": config["num_key_value_heads"], **changes}


def write(directory: Path, params: dict[str, Any], tensors: Tensors, files: int = 1) -> Path:
    (directory / "params.json").write_text(json.dumps(params))
    if files == 1:
        save_file(tensors, directory / "consolidated.safetensors")
        return directory
    names = sorted(tensors)
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        save_file(part, directory / f"consolidated-{i + 1:05d}-of-{files:05d}.safetensors")
    return directory


@pytest.mark.parametrize("block", ["feed_forward", "block_sparse_moe"])
@pytest.mark.parametrize("files", [1, 3])
def test_the_same_weights_and_configuration(block: str, files: int, random_model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(random_model)
    checkpoint = Checkpoint.open(write(tmp_path, params_of(random_model), mistral_tensors(random_model, block), files))
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(checkpoint.config, field) == getattr(source.config, field), field
    for field in ("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "rope_theta"):
        assert getattr(checkpoint.config, field) == getattr(source.config, field), field
    check_surplus(checkpoint)
    for weight in weights_of_model(source.config):
        assert torch.equal(checkpoint.read(weight, torch.float32), source.read(weight, torch.float32)), weight


def test_an_index_names_the_files(random_model: Path, tmp_path: Path) -> None:
    write(tmp_path, params_of(random_model), tensors := mistral_tensors(random_model), 2)
    names = sorted(tensors)
    where = {name: f"consolidated-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    (tmp_path / CONSOLIDATED_INDEX).write_text(json.dumps({"weight_map": where}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.check(weights_of_model(checkpoint.config)) > 0


def test_hugging_faces_files_count_more(random_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", SINGLE):
        (tmp_path / name).write_bytes((random_model / name).read_bytes())
    write(tmp_path, params_of(random_model, dim=4096), mistral_tensors(random_model))
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.files.values()) == {SINGLE}
    assert checkpoint.config.hidden_size == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe": None}, "`moe` is None: not a mixture of experts"),
        ({"dim": "wide"}, "`hidden_size` must be a positive integer, found 'wide'"),
        ({"yarn": {"factor": 4}}, "`yarn` is {'factor': 4}, which is not supported; understood: "),
        ({"moe": {**PARAMS["moe"], "num_shared_experts": 1}}, "`moe.num_shared_experts` is 1, which is not supported"),
        ({"use_biases": True}, "`use_biases` is True, supported: False"),
        ({"model_type": "mamba"}, "`model_type` is 'mamba', supported: 'transformer'"),
    ],
)
def test_what_is_not_a_mixtral(changes: dict[str, Any], said: str, random_model: Path, tmp_path: Path) -> None:
    write(tmp_path, params_of(random_model, **changes), {"norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.load(tmp_path)
    assert said in str(caught.value)
    assert "params.json" in str(caught.value)
