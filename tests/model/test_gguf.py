"""A GGUF file is the model that it was made of: weights, configuration, tokens; what is another model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import Era, config_of, write_gguf
from random_mixtral import save_random_mixtral

from moe_ray.config import load_config
from moe_ray.errors import CheckpointError
from moe_ray.hub import resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.end_tokens import end_token_ids
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus
from moe_ray.model.weights import weights_of_expert, weights_of_model
from moe_ray.text.sampling_defaults import sampling_defaults

FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings", "sliding_window", "rope_type", "rope_theta"),
]


def resolve(path: Path, cache: Path) -> Path:
    return resolve_model(load_config(flags={"model": {"path": str(path)}, "cache_dir": str(cache)}))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral whose rows are of whole blocks."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("wide"),
        seed=4,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
        max_position_embeddings=128,
    )


@pytest.mark.parametrize("era", ["stacked", "separate", "joined"])
def test_weights_and_configuration_are_those_it_was_made_of(
    era: Era, random_model: Path, tmp_path: Path, cache: Path
) -> None:
    directory = resolve(write_gguf(random_model, tmp_path / "random.gguf", era), cache)
    source, checkpoint = Checkpoint.open(random_model), Checkpoint.open(directory)
    for field in FIELDS:
        assert getattr(checkpoint.config, field) == getattr(source.config, field), field
    assert checkpoint.config.dtype == "float32"
    check_surplus(checkpoint)
    for weight in weights_of_model(source.config):
        assert torch.equal(checkpoint.read(weight, torch.float32), source.read(weight, torch.float32)), weight
    assert resolve(tmp_path / "random.gguf", cache) == resolve(directory, cache) == directory, "made once"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
@pytest.mark.parametrize("era", ["stacked", "separate"])
def test_quantised_weights(kind: str, era: Era, wide_model: Path, tmp_path: Path, cache: Path) -> None:
    """Equal to the reference's, row by row; heads in halves again, though their rows are blocks."""
    checkpoint = Checkpoint.open(resolve(write_gguf(wide_model, tmp_path / "wide.gguf", era, kind), cache))
    source = Checkpoint.open(wide_model)
    qtype = GGMLQuantizationType[kind]
    for weight in weights_of_model(source.config):
        expected = source.read(weight, torch.float32).numpy()
        if expected.ndim > 1 and weight.role != "router":
            expected = np.asarray(dequantize(quantize(expected, qtype), qtype)).reshape(expected.shape)
        found = checkpoint.read(weight, torch.float32).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7 * np.abs(expected).max())
    q = next(weight for weight in weights_of_model(source.config) if weight.role == "q")
    matrix = checkpoint.matrix(q)
    assert (matrix.grouping is None) == (kind in ("F16", "BF16"))
    if matrix.grouping is not None:
        np.testing.assert_array_equal(matrix.codes().values(), checkpoint.read(q, torch.float32).numpy())


def test_an_expert_reads_only_its_own_bytes(wide_model: Path, tmp_path: Path, cache: Path) -> None:
    checkpoint = Checkpoint.open(resolve(write_gguf(wide_model, tmp_path / "wide.gguf", kind="Q4_0"), cache))
    config = checkpoint.config
    weights = weights_of_expert(config, 1, 2)
    for weight in weights:
        checkpoint.read(weight, torch.float32)
    numel = 3 * config.hidden_size * config.intermediate_size
    assert checkpoint.bytes_read == checkpoint.check(weights) == numel // 32 * 18


def test_a_file_in_parts(random_model: Path, tmp_path: Path, cache: Path) -> None:
    """Any part stands for all; a part that is missing is named."""
    write_gguf(random_model, tmp_path / "m.gguf", split=700_000)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    directory = resolve(tmp_path, cache)
    assert resolve(parts[1], cache) == directory
    source, checkpoint = Checkpoint.open(random_model), Checkpoint.open(directory)
    for weight in weights_of_model(source.config):
        assert torch.equal(checkpoint.read(weight, torch.float32), source.read(weight, torch.float32)), weight
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"part {parts[2].name} is not beside it"):
        resolve(parts[0], cache)


def test_a_file_that_changed_is_unpacked_again(random_model: Path, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(random_model, tmp_path / "m.gguf")
    first = resolve(path, cache)
    write_gguf(random_model, path, era="separate", llama__attention__sliding_window=64)
    second = resolve(path, cache)
    assert first != second
    assert ModelConfig.load(second).sliding_window == 64


def test_tied_scaled_and_recommended(random_model: Path, tmp_path: Path, cache: Path) -> None:
    """What is only in metadata: a linear scale of positions, sampling, end tokens; and a head that is the embedding."""
    source = tmp_path / "tied"
    shutil.copytree(random_model, source)
    (source / "config.json").write_text(json.dumps({**config_of(source), "tie_word_embeddings": True}))
    scaled = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    sampling = {"general__sampling__temp": 0.7, "general__sampling__top_k": 40}
    ends = {"tokenizer__ggml__eos_token_id": 2, "tokenizer__ggml__eot_token_id": 5}
    directory = resolve(write_gguf(source, tmp_path / "m.gguf", **scaled, **sampling, **ends), cache)
    config = ModelConfig.load(directory)
    assert config.tie_word_embeddings
    assert (config.rope_type, config.raw["rope_parameters"]["factor"]) == ("linear", 4.0)
    assert sampling_defaults(directory) == {"temperature": 0.7, "top_k": 40}
    assert end_token_ids(directory) == {2, 5}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama__expert_count": 0}, "a dense model, without experts; `moe-ray convert upcycle`"),
        ({"llama__rope__scaling__type": "yarn"}, "`llama.rope.scaling.type` is 'yarn', supported: 'none', 'linear'"),
        ({"llama__rope__dimension_count": 4}, "`llama.rope.dimension_count` is 4, supported: that of a head, 8"),
        ({"llama__expert_gating_func": 2}, "`llama.expert_gating_func` is 2, supported: 0 or 1"),
        ({"llama__expert_shared_count": 1}, "`llama.expert_shared_count` is 1, supported: 0"),
        (
            {"llama__block_count": "four"},
            "`llama.block_count` must be an integer, the same for all layers, found 'four'",
        ),
        ({"general__architecture": "mamba"}, "architecture 'mamba', supported: 'llama' with experts (Mixtral)"),
        ({"tokenizer__ggml__model": "rwkv"}, "`tokenizer.ggml.model` is 'rwkv', supported: 'llama', 'gpt2'"),
    ],
)
def test_what_another_model_is_named_by(
    metadata: dict[str, int | str], said: str, random_model: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(write_gguf(random_model, tmp_path / "m.gguf", **metadata), cache)
    assert said in str(caught.value)
    assert "m.gguf" in str(caught.value)
    assert not list(cache.glob("gguf/m-*")), "nothing is left half made"


def test_types_that_are_not_computed(random_model: Path, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(random_model, tmp_path / "m.gguf", kind="F16")
    data = bytearray(path.read_bytes())
    name = b"blk.2.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = (25).to_bytes(4, "little")  # I16
    path.write_bytes(data)
    checkpoint = Checkpoint.open(resolve(path, cache))
    with pytest.raises(
        CheckpointError, match=r"blk.2.attn_v.weight: dtype I16, supported: F32, BF16, F16, and .*gguf_q6_k"
    ):
        checkpoint.check(weights_of_model(checkpoint.config))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda data: data[: len(data) // 2], "bytes, its header says"),
        (lambda data: data[:200], "bytes, its header"),
        (lambda data: b"GGML" + data[4:], "its first bytes are not GGUF"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "its header counts"),
        (lambda data: b"", "0 bytes, its header counts 4"),
    ],
)
def test_a_damaged_file(
    edit: Callable[[bytes], bytes], said: str, random_model: Path, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(random_model, tmp_path / "m.gguf")
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(CheckpointError, match=said) as caught:
        resolve(path, cache)
    assert "not a whole GGUF file" in str(caught.value)


@pytest.mark.parametrize(("version", "said"), [(b"\1\0\0\0", "version 1"), (b"\0\0\0\3", "a big-endian file")])
def test_files_of_another_kind(version: bytes, said: str, random_model: Path, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(random_model, tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:4] + version + data[8:])
    with pytest.raises(CheckpointError, match=f"GGUF, {said}; supported: little-endian, versions 2 and 3"):
        resolve(path, cache)


def test_several_models_in_a_directory(random_model: Path, tmp_path: Path, cache: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        write_gguf(random_model, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several GGUF files; name one: q4.gguf, q8.gguf"):
        resolve(tmp_path, cache)
