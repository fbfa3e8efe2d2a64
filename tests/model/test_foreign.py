"""Directories that are not what is read: each error says what the directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import SINGLE, refuse_foreign_file
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_model

LORA = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": True}
AWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
COMPRESSED = {"config_groups": {"group_0": {"weights": {"block_structure": [64, 128]}}}, "format": "float-quantized"}
WEIGHTS, CONFIG = b"weights", {"model_type": "mixtral"}


def directory(path: Path, **files: Any) -> Path:
    """Files by name, `__` for a dot: bytes as they are, objects as JSON."""
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    return path


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"adapter_config__json": LORA, "adapter_model__safetensors": WEIGHTS}, "a LORA adapter of owner/base, not a"),
        ({"adapter_config__json": LORA, "adapter_model__bin": WEIGHTS, "config__json": CONFIG}, "a LORA adapter of"),
        ({"adapter_config__json": b"{", "adapter_model__safetensors": WEIGHTS}, "a LORA adapter, not a model"),
        (
            {"adapter_config__json": LORA, "model__safetensors": WEIGHTS, "config__json": CONFIG},
            "lies beside the weights and would not be applied",
        ),
        (
            {"adapter_config__json": LORA, "model__safetensors__index__json": {}, "config__json": CONFIG},
            "lies beside the weights and would not be applied",
        ),
        ({"mixtral__Q4_K_M__gguf": WEIGHTS}, "mixtral.Q4_K_M.gguf: a GGUF file, which is read as a model of its own"),
        ({"mixtral__gguf": WEIGHTS, "config__json": CONFIG, "README__md": b""}, "a GGUF file"),
        ({"params__json": {"dim": 4096}, "consolidated__00__pth": WEIGHTS}, "Mistral's own layout as pickles"),
        ({"params__json": {"dim": 4096}, "consolidated__00__pt": WEIGHTS}, "Mistral's own layout as pickles"),
        ({"consolidated__safetensors": WEIGHTS}, "Mistral's own layout, whose params.json is missing"),
        ({"pytorch_model__bin": WEIGHTS, "config__json": CONFIG}, "pytorch_model.bin: pickle checkpoints"),
        ({"tf_model__h5": WEIGHTS, "config__json": CONFIG}, "TensorFlow weights"),
        ({"flax_model__msgpack": WEIGHTS, "config__json": CONFIG}, "Flax weights"),
        ({"model__onnx": WEIGHTS, "config__json": CONFIG}, "an ONNX model"),
    ],
)
def test_a_directory_says_what_it_is(tmp_path: Path, files: dict[str, Any], named: str) -> None:
    directory(tmp_path, **files)
    for refused in (ModelConfig.load, Checkpoint.open):
        with pytest.raises(CheckpointError) as caught:
            refused(tmp_path)
        assert named in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "settings", "told"),
    [
        ("quantization_config", {"quant_method": "gptq", **GPTQ}, ("gptq", True, None)),
        ("quantization_config", {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, ("gptq", False, None)),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "version": "gemm"}, ("awq", True, None)),
        ("quantization_config", {"load_in_4bit": False, "load_in_8bit": True}, ("bitsandbytes", True, None)),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 64]}, ("fp8", True, (128, 64))),
        ("compression_config", COMPRESSED, ("compressed-tensors", True, (64, 128))),
    ],
)
def test_config_json_says_how_it_is_quantised(
    random_model: Path, key: str, settings: dict[str, Any], told: tuple[str, bool, tuple[int, int] | None]
) -> None:
    raw = json.loads((random_model / "config.json").read_text())
    found = ModelConfig.from_dict({**raw, key: settings}).quantization
    assert found is not None
    assert (found.method, found.zeros_plus_one, found.block) == told
    assert key in found.file


@pytest.mark.parametrize(
    ("name", "settings", "method"), [("quantize_config.json", GPTQ, "gptq"), ("quant_config.json", AWQ, "awq")]
)
def test_a_file_beside_config_json_says_it(
    random_model: Path, tmp_path: Path, name: str, settings: dict[str, Any], method: str
) -> None:
    (tmp_path / "config.json").write_bytes((random_model / "config.json").read_bytes())
    assert ModelConfig.load(tmp_path).quantization is None
    (tmp_path / name).write_text(json.dumps(settings))
    found = ModelConfig.load(tmp_path).quantization
    assert found is not None
    assert (found.method, found.file) == (method, str(tmp_path / name))
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name}: not readable as JSON"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "settings", "named"),
    [
        ("quantization_config", {"quant_method": "aqlm"}, "weights quantised with aqlm are not read; read are awq, "),
        ("quantization_config", {"bits": 4}, "weights quantised with a method without a name are not read"),
        ("quantization", {"group_size": 64, "bits": 4}, "weights quantised with MLX, 4 bits are not read"),
        ("quantization_config", {"quant_method": "awq", "version": "gemv"}, "version 'gemv' is not read"),
        ("quantization_config", {"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' is not read"),
        ("quantization_config", {"quant_method": "gptq", "is_marlin_format": True}, "Marlin's order are not read"),
        ("quantization_config", {"quant_method": "gptq", "pack_dtype": "int8"}, "pack_dtype 'int8' is not read"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128]}, "found (128,)"),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'nvfp4' is not"),
    ],
)
def test_config_json_says_that_it_is_quantised_otherwise(
    random_model: Path, key: str, settings: dict[str, Any], named: str
) -> None:
    raw = json.loads((random_model / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**raw, key: settings}, "there/config.json")
    assert named in str(caught.value)
    assert f"there/config.json: {key}" in str(caught.value)


@pytest.mark.parametrize("suffix", ["codes", "Qidxs"])
def test_quantised_tensors_that_no_file_speaks_of(random_model: Path, tmp_path: Path, suffix: str) -> None:
    stem = "model.layers.1.block_sparse_moe.experts.3.w1."
    tensors = load_file(random_model / SINGLE)
    del tensors[stem + "weight"]
    tensors[stem + suffix] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((random_model / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{stem}{suffix}: \S+ weights are not read; read are floats and "):
        checkpoint.check(weights_of_model(checkpoint.config))


def test_what_lies_beside_a_whole_checkpoint_does_no_harm(random_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", SINGLE):
        (tmp_path / name).write_bytes((random_model / name).read_bytes())
    others = ("consolidated__safetensors", "model__Q4__gguf", "pytorch_model__bin", "model__onnx", "tf_model__h5")
    beside = dict.fromkeys(others, WEIGHTS)
    directory(tmp_path, params__json={"dim": 64}, **beside)
    assert Checkpoint.open(tmp_path).config.hidden_size == 64


def test_nothing_known_is_said_as_before(tmp_path: Path) -> None:
    directory(tmp_path, params__json={"learning_rate": 0.1})
    with pytest.raises(CheckpointError, match=r"config.json: not found"):
        ModelConfig.load(tmp_path)


def test_a_file_where_a_directory_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a model is a directory with config.json and safetensors files, or a"):
        refuse_foreign_file(tmp_path / "model.safetensors")
