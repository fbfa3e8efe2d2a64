"""Reading checkpoints by name: a process touches its own tensors only, and every fault names its file and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert_reader import read_experts
from moe_ray.model.families import Weight
from moe_ray.model.foreign import INDEX, SINGLE
from moe_ray.model.matrix import tensor_of
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.safetensors_file import read_header
from moe_ray.model.trunk import Trunk
from moe_ray.model.weights import weights_of_expert, weights_of_model, weights_of_trunk

CPU = torch.device("cpu")
LAYERS, EXPERTS = 4, 8
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def whole(random_model: Path, tmp_path: Path) -> Path:
    """The random model in one file, to be damaged at will."""
    target = tmp_path / "whole"
    shutil.copytree(random_model, target)
    return target


@pytest.fixture
def sharded(random_model: Path, tmp_path: Path) -> Path:
    """The random model with one shard per expert and one for the trunk."""
    target = tmp_path / "sharded"
    target.mkdir()
    shutil.copy(random_model / "config.json", target)
    tensors = load_file(random_model / SINGLE)
    files = {name: f"{_owner(name)}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, target / file)
    (target / INDEX).write_text(json.dumps({"weight_map": files}))
    return target


def _owner(name: str) -> str:
    return f"expert{name.split('.experts.')[1].split('.')[0]}" if ".experts." in name else "trunk"


def name_of(checkpoint: Checkpoint, weight: Weight) -> str:
    return checkpoint.place(weight).named("weight")


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    edit(tensors)
    save_file(tensors, directory / SINGLE)


def refused(action: Callable[[], Any], *names: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    for name in names:
        assert name in message, f"{message!r} does not name {name!r}"
    return message


def check_all(directory: Path) -> int:
    checkpoint = Checkpoint.open(directory)
    return checkpoint.check(weights_of_model(checkpoint.config))


def test_the_weights_are_exactly_what_transformers_writes(random_model: Path) -> None:
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(random_model / SINGLE).items()}
    checkpoint = Checkpoint.open(random_model)
    needed = weights_of_model(checkpoint.config)
    assert {name_of(checkpoint, weight): weight.shape for weight in needed} == stored
    assert check_all(random_model) == sum(4 * torch.Size(shape).numel() for shape in stored.values())


def test_read_gives_the_tensor_in_memory_of_its_own(whole: Path) -> None:
    checkpoint = Checkpoint.open(whole)
    (weight,) = [w for w in weights_of_trunk(checkpoint.config) if w.role == "embed"]
    stored = load_file(whole / SINGLE)[EMBED]
    for dtype in (torch.float32, torch.bfloat16):
        read = checkpoint.read(weight, dtype)
        assert torch.equal(read, stored.to(dtype))
        read.zero_()
    assert torch.equal(checkpoint.read(weight, torch.float32), stored)
    assert checkpoint.bytes_read == 3 * stored.nbytes


def test_each_process_reads_its_own_bytes_only(random_model: Path) -> None:
    tensors = load_file(random_model / SINGLE)
    trunk = Checkpoint.open(random_model)
    reports: list[tuple[int, int]] = []
    Trunk.load(trunk, None, Compute(Backend("float32")), 64, lambda *report: reports.append(report))  # type: ignore[arg-type]
    own = sum(t.nbytes for name, t in tensors.items() if _owner(name) == "trunk")
    assert trunk.bytes_read == own
    assert reports[-1] == (own, own)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    for expert in range(EXPERTS):
        checkpoint = Checkpoint.open(random_model)
        assert checkpoint.bytes_read == 0, "opening reads no tensor"
        ffn = read_experts(checkpoint, {(layer, expert) for layer in range(LAYERS)}, Compute(Backend("bfloat16")))
        own = sum(t.nbytes for name, t in tensors.items() if _owner(name) == f"expert{expert}")
        assert checkpoint.bytes_read == own
        assert ffn.nbytes == own // 2
    part = Checkpoint.open(random_model)
    read_experts(part, {(2, 5)}, Compute(Backend("float32")))
    assert part.bytes_read == 3 * 4 * 64 * 112


@pytest.mark.parametrize("damage", ["deleted", "corrupted"])
def test_an_expert_does_not_need_the_shards_of_others(sharded: Path, damage: str) -> None:
    for path in sharded.glob("*.safetensors"):
        if path.stem != "expert3":
            path.unlink() if damage == "deleted" else path.write_bytes(b"garbage")
    checkpoint = Checkpoint.open(sharded)
    ffn = read_experts(checkpoint, {(layer, 3) for layer in range(LAYERS)}, Compute(Backend("float32")))
    assert checkpoint.bytes_read == ffn.nbytes == LAYERS * 3 * 4 * 64 * 112
    weights = weights_of_expert(checkpoint.config, 0, 2)
    refused(lambda: checkpoint.check(weights), "expert2.safetensors")


def test_a_sharded_checkpoint_reads_as_the_whole_one(sharded: Path, random_model: Path) -> None:
    one, other = Checkpoint.open(sharded), Checkpoint.open(random_model)
    for weight in weights_of_model(one.config):
        assert torch.equal(one.read(weight, torch.float32), other.read(weight, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_without_torch_are_torchs(whole: Path, dtype: torch.dtype) -> None:
    change(whole, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    checkpoint = Checkpoint.open(whole)
    for weight in weights_of_expert(checkpoint.config, 2, 3):
        read, start = checkpoint.read(weight, torch.bfloat16), checkpoint.bytes_read
        again = checkpoint.read_values(weight)
        assert again.dtype.name == str(dtype).removeprefix("torch.")
        assert torch.equal(tensor_of(again).bfloat16(), read)
        assert checkpoint.bytes_read - start == start, "each way counts what it took"
        checkpoint.bytes_read = 0


def test_a_fingerprint_is_that_of_the_values(sharded: Path, random_model: Path, whole: Path) -> None:
    def prints(directory: Path) -> dict[tuple[int, int], bytes]:
        checkpoint = Checkpoint.open(directory)
        found = {
            (layer, expert): checkpoint.fingerprint(weights_of_expert(checkpoint.config, layer, expert))
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        }
        assert checkpoint.bytes_read == 0
        return found

    before = prints(random_model)
    assert len(set(before.values())) == LAYERS * EXPERTS, "no two experts are alike"
    assert prints(sharded) == prints(whole) == before, "wherever the same values lie"
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    change(whole, lambda tensors: tensors.update({name: tensors[name] * (1 + 2**-20)}))
    assert {key for key, value in prints(whole).items() if value != before[key]} == {(1, 6)}


def test_a_file_that_becomes_shorter_while_it_is_read(whole: Path) -> None:
    checkpoint = Checkpoint.open(whole)
    weights = weights_of_expert(checkpoint.config, 3, 7)
    checkpoint.check(weights)
    header = read_header(whole / SINGLE)
    first = min(weights, key=lambda weight: header[name_of(checkpoint, weight)].start)
    name = name_of(checkpoint, first)
    with open(whole / SINGLE, "r+b") as file:
        file.truncate(header[name].start + 100)
    refused(lambda: checkpoint.read_values(first), SINGLE, name, "bytes early")


def test_missing_tensor(whole: Path) -> None:
    name = "model.layers.2.block_sparse_moe.experts.6.w2.weight"
    change(whole, lambda tensors: tensors.pop(name))
    refused(lambda: check_all(whole), str(whole), name, "missing")
    refused(lambda: local_experts(Checkpoint.open(whole), Compute(Backend("float32"))), name)


def test_tensor_that_the_index_names_and_the_file_lacks(sharded: Path) -> None:
    name = "model.norm.weight"
    files = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": {**files, name: "expert0.safetensors"}}))
    refused(lambda: check_all(sharded), "expert0.safetensors", name)


def test_wrong_shape(whole: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(whole, lambda tensors: tensors.update({name: torch.zeros(17, 64)}))
    refused(lambda: check_all(whole), SINGLE, name, "[17, 64]", "[16, 64]")


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, torch.bool])
def test_wrong_dtype(whole: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    change(whole, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(lambda: check_all(whole), SINGLE, name, "dtype", "F32, BF16, F16")


@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
def test_truncated_file(whole: Path, kept: int) -> None:
    data = (whole / SINGLE).read_bytes()
    (whole / SINGLE).write_bytes(data[:kept])
    refused(lambda: check_all(whole), str(whole / SINGLE), "not a whole safetensors file")


def test_truncated_shard_names_the_tensor_that_was_wanted(sharded: Path) -> None:
    path = sharded / "trunk.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(lambda: check_all(sharded), str(path), EMBED)


def test_index_names_an_absent_file(sharded: Path) -> None:
    (sharded / "trunk.safetensors").unlink()
    refused(lambda: check_all(sharded), str(sharded / "trunk.safetensors"), EMBED, INDEX, "missing")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "w.bin", ".."])
def test_index_that_leads_out_of_the_directory_or_to_a_pickle(sharded: Path, name: str) -> None:
    files = json.loads((sharded / INDEX).read_text())["weight_map"]
    (sharded / INDEX).write_text(json.dumps({"weight_map": {**files, EMBED: name}}))
    refused(lambda: Checkpoint.open(sharded), INDEX, repr(name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '"x"', "\xff{"])
def test_unreadable_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    refused(lambda: Checkpoint.open(sharded), str(sharded / INDEX), "weight_map")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(whole: Path, name: str) -> None:
    (whole / SINGLE).rename(whole / name)
    refused(lambda: Checkpoint.open(whole), name, "safetensors", "refused")


def test_nothing_there(tmp_path: Path, whole: Path) -> None:
    refused(lambda: Checkpoint.open(tmp_path / "absent"), "absent", "not a directory")
    refused(lambda: Checkpoint.open(tmp_path), "config.json")
    (whole / SINGLE).unlink()
    refused(lambda: Checkpoint.open(whole), SINGLE, INDEX)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_config_that_is_no_json_object(whole: Path, content: bytes) -> None:
    (whole / "config.json").write_bytes(content)
    refused(lambda: Checkpoint.open(whole), str(whole / "config.json"), "JSON")


def test_config_that_is_a_directory(whole: Path) -> None:
    (whole / "config.json").unlink()
    (whole / "config.json").mkdir()
    refused(lambda: Checkpoint.open(whole), str(whole / "config.json"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, ["model_type", "'mamba'", "mixtral"]),
        ({"model_type": None}, ["model_type"]),
        ({"quantization_config": {"quant_method": "aqlm"}}, ["quantization_config", "aqlm", "not read", "gptq"]),
        ({"quantization_config": "awq"}, ["quantization_config", "an object", "'awq'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "8", "3"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_attention_heads": "8"}, ["num_attention_heads", "'8'"]),
        ({"num_attention_heads": True}, ["num_attention_heads"]),
        ({"hidden_size": -64}, ["hidden_size"]),
        ({"head_dim": 9}, ["head_dim", "even"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "num_local_experts 8"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"hidden_act": "swish9"}, ["hidden_act", "swish9", "silu"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "tiny"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type", "'dynamic'", "yarn"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, ["rope_type", "'su'"]),
        ({"rope_parameters": "linear"}, ["rope_parameters", "linear"]),
        ({"rope_parameters": {"rope_theta": "big"}}, ["rope_theta", "'big'"]),
        ({"sliding_window": -5}, ["sliding_window", "-5"]),
    ],
)
def test_config_faults_name_the_key(random_model: Path, changes: dict[str, Any], named: list[str]) -> None:
    raw = json.loads((random_model / "config.json").read_text())
    refused(lambda: ModelConfig.from_dict({**raw, **changes}, "there/config.json"), "there/config.json", *named)


@pytest.mark.parametrize(
    "key",
    [
        "num_local_experts",
        "num_experts_per_tok",
        "max_position_embeddings",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "sliding_window",
        "tie_word_embeddings",
    ],
)
def test_a_key_left_out_means_what_it_means_to_transformers(random_model: Path, key: str) -> None:
    from transformers import MixtralConfig

    raw = json.loads((random_model / "config.json").read_text())
    raw.pop(key, None)
    assert getattr(ModelConfig.from_dict(raw), key) == getattr(MixtralConfig.from_dict(dict(raw)), key)


def test_old_and_new_ways_to_write_rope(random_model: Path) -> None:
    raw = json.loads((random_model / "config.json").read_text())
    raw.pop("rope_parameters", None)
    assert ModelConfig.from_dict(raw).rope_theta == 1e6
    assert ModelConfig.from_dict({**raw, "rope_theta": 5e5}).rope_theta == 5e5
    new = ModelConfig.from_dict({**raw, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert (new.rope_type, new.rope_theta) == ("default", 1e4)
    old = ModelConfig.from_dict({**raw, "rope_theta": 2e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (old.rope_type, old.rope_theta) == ("linear", 2e5)
