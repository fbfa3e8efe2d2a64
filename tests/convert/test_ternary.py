"""Ternary checkpoints: as small as asked for, better by GPTQ than by rounding, served as the floats they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.convert.quantize.config import QuantizeConfig
from moe_ray.convert.quantize.gptq import gptq, output_error
from moe_ray.convert.quantize.quantize import quantize
from moe_ray.convert.quantize.ternary_scheme import TernaryScheme, share_of
from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats import GroupedCodes, Grouping, Place
from moe_ray.model.formats.ternary import pack_ternary
from moe_ray.model.weights import weights_of_model

PROMPT = list(range(7, 40))


def bits_on_disk(codes: GroupedCodes) -> float:
    tensors = pack_ternary(Place("w"), codes)
    return 8 * sum(tensor.nbytes for tensor in tensors.values()) / codes.codes.size


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    mixed = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width // 4, generator=generator) @ mixed
    return inputs + 0.3 * torch.randn(rows, width, generator=generator)


def random_weight(rows: int, width: int) -> torch.Tensor:
    """Rows of different sizes, and here and there a weight that is far out."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    return weight * torch.where(torch.rand(rows, width, generator=generator) < 0.001, 6.0, 1.0)


@pytest.mark.parametrize("bits", [0.4, 0.6, 0.8, 1.0, 1.3])
def test_a_weight_takes_as_many_bits_as_asked_for_and_gptq_loses_less(bits: float) -> None:
    weight, inputs = random_weight(256, 512), correlated(1000, 512, 1)
    hessian, scheme = inputs.T @ inputs, TernaryScheme(bits)
    rounded = scheme.nearest(weight)
    adapted = gptq(weight, hessian, scheme.grid(512), damping=0.05, act_order=True)
    for codes in (rounded, adapted):
        assert codes.grouping == Grouping(4, 512)
        assert codes.order is None
        assert set(np.unique(codes.codes)) <= {7, 8, 9}
        assert 0.93 * bits < bits_on_disk(codes) < 1.02 * bits
    held_out = correlated(1000, 512, 2)
    other = held_out.T @ held_out
    losses = [output_error(torch.from_numpy(codes.values()) - weight, other) for codes in (rounded, adapted)]
    assert losses[1] < 0.85 * losses[0] < output_error(weight, other)


def test_a_rounded_row_has_the_scale_of_the_least_error() -> None:
    weight = random_weight(16, 256)
    found = TernaryScheme(1.0).nearest(weight)
    levels = torch.from_numpy(found.codes).double() - 8
    error = (torch.from_numpy(found.values()) - weight).square().sum(1)
    for factor in (0.98, 1.02):
        other = (levels * torch.from_numpy(found.scales).double() * factor - weight).square().sum(1)
        assert bool(((other > error) | (levels == 0).all(1)).all())


def test_the_finest_ternary_weights_are_lloyd_and_maxs() -> None:
    """Of normally distributed weights three levels lose 0.190 of the variance (Max 1960, table I)."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
    values = torch.from_numpy(TernaryScheme(1.6).nearest(weight).values())
    assert float((values - weight).square().mean()) == pytest.approx(0.190, abs=0.003)


def test_weights_of_nothing_stay_nothing() -> None:
    """Rows of zeros, whole weights of zeros, inputs that were never seen: no scale is not a number."""
    weight = random_weight(64, 128)
    weight[3] = 0
    hessian = torch.zeros(128, 128)
    hessian[:8, :8] = torch.eye(8)
    scheme = TernaryScheme(1.0)
    for values in (weight, torch.zeros(64, 128)):
        for codes in (scheme.nearest(values), gptq(values, hessian, scheme.grid(128), act_order=True)):
            assert np.isfinite(codes.values()).all()
            assert not codes.values()[3].any()


def test_fewer_bits_are_fewer_digits() -> None:
    shares = [share_of(bits) for bits in (0.1, 0.3, 0.6, 1.0, 1.5, 3.0)]
    assert shares == sorted(shares)
    assert shares[3] == pytest.approx(0.22, abs=0.005)  # of 1 bit: entropy(0.22) + 0.22 = 0.98


@pytest.fixture(scope="module")
def ternary(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ternary") / "model"
    quantize(model, directory, QuantizeConfig(1.4, calibration_text=text, calibration_tokens=256))
    return directory


def test_it_is_served_as_the_floats_it_stands_for(ternary: Path, tmp_path: Path) -> None:
    """The same tokens as transformers with the decoded values, and as on the CPU's kernels within their rounding."""
    checkpoint = Checkpoint.open(ternary)
    floats = {
        checkpoint.place(weight).named("weight"): checkpoint.read(weight, torch.float32)
        for weight in weights_of_model(checkpoint.config)
    }
    checkpoint.close()
    for name, values in floats.items():
        if ".experts." in name:
            scale = values.abs().amax(1, keepdim=True)
            assert torch.equal(values, scale * values.sign()), name
    save_file(floats, tmp_path / SINGLE, metadata={"format": "pt"})
    config = json.loads((ternary / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "moe-ray-ternary", "bits": 1.4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    llm = LLM(ternary, dtype="float32", kernels="torch", engine={"kv_cache_gib": 0.02})
    found = llm.generate([PROMPT], greedy)[0].token_ids
    assert found == Reference(tmp_path).greedy(PROMPT, 24)


def test_its_files_are_small_and_planned_as_they_are_held(ternary: Path, model: Path) -> None:
    tensors = load_file(next(ternary.glob("model-*.safetensors")))
    weights = sum(tensor.numel() for name, tensor in load_file(model / SINGLE).items() if ".experts." in name)
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert 8 * stored / weights < 1.02 * 1.4
    found = planned(load_config({"model": {"path": str(ternary)}}), ternary)
    experts = [actor for actor in found.plan.actors if actor.name != "Trunk"]
    assert sum(found.bytes_to_read[actor.name] for actor in experts) == stored
    assert all(actor.held_as == ("ternary",) for actor in experts)
    assert sum(actor.weight_bytes for actor in experts) < 0.6 * weights  # 4 bits, and scales


def test_experts_in_ternary_and_the_trunk_in_integers(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q", QuantizeConfig(1.0, 64, method="rtn", trunk="int8"))
    checkpoint = Checkpoint.open(tmp_path / "q")
    formats = {weight.role: checkpoint.find(weight).format for weight in weights_of_model(checkpoint.config)}
    assert formats["up"] == formats["down"] == "ternary"
    assert formats["q"] == formats["out"] == "pack-quantized"
    assert formats["router"] == "bfloat16"


def test_what_does_not_fit_ternary_weights_is_refused() -> None:
    for wrong, message in (
        ({"bits": 2}, "`bits` must be 4 or 8, or 0.25 to 1.6"),
        ({"bits": 0.1}, "`bits` must be 4 or 8, or 0.25 to 1.6"),
        ({"bits": 1, "method": "awq"}, "`method` must be rtn or gptq for ternary"),
        ({"bits": 1, "group_size": 64}, "`group_size` must be left out"),
        ({"bits": 1, "asymmetric": True}, "`asymmetric` must be false for ternary"),
        ({"bits": 1, "act_order": True}, "`act_order` must be false"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantizeConfig(**wrong)  # type: ignore[arg-type]


def test_a_file_cut_short_is_refused(ternary: Path, tmp_path: Path) -> None:
    for path in ternary.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = next(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=f"{shard.name}.*not a whole safetensors file"):
        checkpoint.check(weights_of_model(checkpoint.config))


def test_the_command(model: Path, tmp_path: Path) -> None:
    words = ["convert", "quantize", str(model), "-o", str(tmp_path / "q"), "--method", "rtn", "--bits", "0.9"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "moe-ray-ternary", "bits": 0.9}
