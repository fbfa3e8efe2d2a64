"""What of an adapter's files is read, and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import SHAPE, save_old_adapter
from safetensors.torch import load_file, save_file

from moe_ray.errors import AdapterError
from moe_ray.model.lora.adapter_config import AdapterConfig
from moe_ray.model.lora.adapter_file import Adapter, read_adapter
from moe_ray.model.model_config import ModelConfig

MODEL = ModelConfig.from_dict({"model_type": "mixtral", **SHAPE})
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
PREFIX = "base_model.model.model.layers"
ATTENTION = "self_attn.q_proj"


def pair(module: str, n: int, k: int, r: int = 4) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(r, k), f"{module}.lora_B.weight": torch.ones(n, r)}


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    return directory


def read(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Adapter:
    return read_adapter(write(directory, tensors, **config), MODEL)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is IA3, supported: LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "`peft_type` is PREFIX_TUNING"),
        ({"peft_type": "LOHA"}, "`peft_type` is LOHA"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"use_dora": True}, "`use_dora` is True, DoRA is not supported"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
        ({"lora_bias": True}, "`lora_bias` is True"),
        ({"layer_replication": [[0, 4]]}, "`layer_replication` is"),
        ({"alora_invocation_tokens": [3]}, "`alora_invocation_tokens` is"),
        ({"trainable_token_indices": [3]}, "`trainable_token_indices` is"),
        ({"a_key_of_2027": {"x": 1}}, "`a_key_of_2027` is"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
        ({"r": 257}, "`r` is 257, expected a whole number from 1 to 256"),
        ({"r": 0}, "`r` is 0"),
        ({"r": "8"}, "`r` is '8'"),
        ({"rank_pattern": {"q_proj": 1000}}, "`rank_pattern.q_proj` is 1000"),
        ({"alpha_pattern": {"q_proj": None}}, "`alpha_pattern.q_proj` is None"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` is \[1\], expected an object"),
        ({"lora_alpha": "x"}, "`lora_alpha` is 'x', expected a number"),
        ({"target_modules": "(q"}, "`target_modules` is '\\(q', which is no regular expression"),
        ({"target_modules": {"q": 1}}, "`target_modules` is"),
        ({"layers_to_transform": "all"}, "`layers_to_transform` is 'all'"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=says) as raised:
        AdapterConfig.from_dict({**LORA, **config}, "there/adapter_config.json")
    assert str(raised.value).startswith("there/adapter_config.json: ")


def test_what_says_nothing_of_the_computation_is_no_matter() -> None:
    config = {
        **LORA,
        "lora_dropout": 0.1,
        "inference_mode": True,
        "megatron_core": "x",
        "use_qalora": False,
        "new": None,
    }
    assert AdapterConfig.from_dict(config).of("model.layers.0.self_attn.q_proj") == (4, 2.0)


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({}, "model.layers.1.self_attn.q_proj", True),
        ({}, "model.layers.1.self_attn.k_proj", False),
        ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, "model.layers.1.self_attn.k_proj", True),
        ({"target_modules": r".*layers\.0\.self_attn\.(q|k)_proj"}, "model.layers.1.self_attn.k_proj", False),
        ({"target_modules": "all-linear"}, "model.layers.1.self_attn.k_proj", True),
        ({"target_modules": "all-linear"}, "lm_head", False),
        ({"exclude_modules": ["q_proj"]}, "model.layers.1.self_attn.q_proj", False),
        ({"layers_to_transform": [0]}, "model.layers.1.self_attn.q_proj", False),
        ({"layers_to_transform": 1}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": ["h"]}, "model.layers.1.self_attn.q_proj", False),
    ],
)
def test_targets_are_those_of_peft(config: dict[str, Any], name: str, expected: bool) -> None:
    """With peft's own function as a witness."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = AdapterConfig.from_dict({**LORA, **config})
    assert ours.targets(name, 1 if "layers" in name else None) == expected
    if config.get("target_modules") != "all-linear":  # which peft resolves before
        theirs = LoraConfig(**{key: value for key, value in {**LORA, **config}.items() if key != "peft_type"})
        assert bool(check_target_module_exists(theirs, name)) == expected


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (pair(f"{PREFIX}.0.self_attn.w_proj", 64, 64), {}, r"no module model.layers.0.self_attn.w_proj"),
        (pair(f"{PREFIX}.2.{ATTENTION}", 128, 64), {}, "no module model.layers.2"),
        (pair(f"{PREFIX}.0.mlp.experts.4.w1", 96, 64), {"target_modules": ["w1"]}, "no module model.layers.0.mlp"),
        (pair(f"{PREFIX}.0.{ATTENTION}", 128, 64), {"target_modules": ["k_proj"]}, "target modules .* do not name"),
        (pair(f"{PREFIX}.0.{ATTENTION}", 128, 64, 8), {}, r"lora_A.weight: shape \[8, 64\], expected \[4, 64\]"),
        (pair(f"{PREFIX}.0.{ATTENTION}", 64, 64), {}, r"lora_B.weight: shape \[64, 4\], expected \[128, 4\]"),
        ({f"{PREFIX}.0.{ATTENTION}.lora_A.weight": torch.ones(4, 64)}, {}, "no lora_B beside it"),
        ({f"{PREFIX}.0.{ATTENTION}.lora_magnitude_vector": torch.ones(4)}, {}, "not the name of a LoRA tensor"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}, {}, "not the name of a LoRA tensor"),
        ({f"{PREFIX}.0.{ATTENTION}.weight": torch.ones(128, 64)}, {}, "only embed_tokens and lm_head are supported"),
        ({"base_model.model.lm_head.weight": torch.ones(96, 64)}, {}, "`modules_to_save` .* does not name lm_head"),
        (
            {"base_model.model.lm_head.weight": torch.ones(97, 64)},
            {"modules_to_save": ["lm_head"]},
            r"shape \[97, 64\], expected \[96, 64\]",
        ),
        (
            {name: tensor.int() for name, tensor in pair(f"{PREFIX}.0.{ATTENTION}", 128, 64).items()},
            {},
            "dtype I32, supported: F32, BF16, F16",
        ),
        (
            pair(f"{PREFIX}.0.mlp.experts", 64, 96, 16),
            {},
            r"`target_parameters` of adapter_config.json does not name model.layers.0.mlp.experts.down_proj",
        ),
        (
            pair(f"{PREFIX}.0.mlp.experts", 64, 96, 32),
            {"target_parameters": ["experts.down_proj"]},
            "rank 8 for each expert, adapter_config.json says 4",
        ),
        (
            pair(f"{PREFIX}.0.mlp.experts", 64, 95, 16),
            {"target_parameters": ["experts.down_proj"]},
            "are of no stacked parameter of 4 experts",
        ),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterError, match=says) as raised:
        read(tmp_path, tensors, **config)
    assert "adapter_model.safetensors" in str(raised.value)


def no_file(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def a_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def cut(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def no_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def bad_json(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_file, "adapter_model.safetensors: not found$"),
        (a_pickle, "adapter_model.bin is a pickle, which is not read"),
        (cut, "its header says"),
        (no_config, "adapter_config.json: not found"),
        (bad_json, "adapter_config.json: not readable as JSON"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    directory = write(tmp_path, pair(f"{PREFIX}.0.{ATTENTION}", 128, 64))
    damage(directory)
    with pytest.raises(AdapterError, match=says):
        read_adapter(directory, MODEL)


def test_what_an_adapter_touches(tmp_path: Path) -> None:
    attention = read(tmp_path, pair(f"{PREFIX}.1.{ATTENTION}", 128, 64))
    assert attention.touches_trunk
    assert not attention.touches_experts(0)
    assert not attention.touches_experts(1)
    assert attention.rank == 4
    part = attention.trunk_part()
    assert (part.embed, part.head, part.layers[0].q) == (None, None, None)
    assert part.layers[1].q is not None
    assert part.layers[1].q.scale == 2.0
    one = pair(f"{PREFIX}.1.block_sparse_moe.experts.2.w3", 96, 64)
    expert = read(tmp_path, one, target_modules=["w3"])
    assert not expert.touches_trunk
    assert expert.touches_experts(1)
    assert not expert.touches_experts(0)
    assert expert.expert_keys == {(1, 2)}
    assert expert.expert_part(1, 2).up is not None
    other = expert.expert_part(1, 0)
    assert (other.gate, other.up, other.down) == (None, None, None)
    down = read(tmp_path, pair(f"{PREFIX}.0.mlp.experts", 64, 96, 16), target_parameters=["down_proj"])
    assert down.expert_keys == {(0, expert) for expert in range(4)}


def test_an_id_is_that_of_the_content(tmp_path: Path) -> None:
    first, second = (save_old_adapter(tmp_path / name, 3) for name in ("first", "second"))
    number = read_adapter(first, MODEL).adapter_id
    assert number == read_adapter(second, MODEL).adapter_id
    assert 0 < number < 2**63
    path = second / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, path)
    assert read_adapter(second, MODEL).adapter_id != number
    config = first / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 12', '"lora_alpha": 13'))
    assert read_adapter(first, MODEL).adapter_id not in (number, read_adapter(second, MODEL).adapter_id)


def test_additions_of_peft_before_it_exchanged_inputs_and_outputs(tmp_path: Path) -> None:
    """The same sums either way round: a and b of one expert are exchanged and transposed."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 96, generator=generator), torch.randn(64, 16, generator=generator)  # of down, rank 4
    module = f"{PREFIX}.0.mlp.experts"
    of_experts = {"target_parameters": ["down_proj"]}
    new = read(tmp_path, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, **of_experts).expert_part(0, 3)
    # What was B [outputs, r * E] becomes A [r * E, ...] with the experts' ranks one after the other, and the reverse.
    old_a = b.reshape(64, 4, 4).permute(2, 1, 0).reshape(16, 64)
    old_b = a.reshape(4, 4, 96).permute(2, 1, 0).reshape(96, 16)
    exchanged = {f"{module}.lora_A.weight": old_a.contiguous(), f"{module}.lora_B.weight": old_b.contiguous()}
    old = read(tmp_path, exchanged, **of_experts).expert_part(0, 3)
    assert new.down is not None
    assert old.down is not None
    torch.testing.assert_close(
        torch.from_numpy(old.down.b @ old.down.a), torch.from_numpy(new.down.b @ new.down.a), rtol=1e-5, atol=1e-5
    )
