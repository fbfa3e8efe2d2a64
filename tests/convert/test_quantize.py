"""Quantised checkpoints: whole or absent, read by compressed-tensors and transformers as meant, better by GPTQ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM
from typer.testing import CliRunner

from moe_ray.commands.main import app
from moe_ray.convert.quantize import layer as one_layer
from moe_ray.convert.quantize.awq import scale_of, search
from moe_ray.convert.quantize.calibration import CalibrationRun, expert_inputs
from moe_ray.convert.quantize.config import QuantizeConfig
from moe_ray.convert.quantize.gptq import gptq, output_error
from moe_ray.convert.quantize.integer_scheme import IntegerGrid
from moe_ray.convert.quantize.quantize import quantize
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.torch.trunk import LayerTensors
from moe_ray.model.formats import Grouping
from moe_ray.model.formats.rounding import round_to_nearest
from moe_ray.model.trunk_weights import TrunkWeights
from moe_ray.model.weights import weights_of_model

LAYERS, EXPERTS = 2, 4
"""Of the fixture `model`."""


def decompressed(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight as compressed-tensors itself reads it, by its name in the float checkpoint."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    scheme_of = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig.model_validate
    told = scheme_of(json.loads((directory / "config.json").read_text())["quantization_config"])
    compressor = compressors.BaseCompressor.get_value_from_registry(told.format)
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    values = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "weight":
            values[name] = tensor
        elif suffix == "weight_packed":
            assert not any(match_name(stem, ignored) for ignored in told.ignore)
            (scheme,) = [
                scheme
                for scheme in told.config_groups.values()
                if any(match_name(stem, target) for target in scheme.targets)
            ]
            beside = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{stem}.")}
            beside["weight_scale"] = beside["weight_scale"].float()
            values[f"{stem}.weight"] = compressor.decompress(beside, scheme)["weight"]
    return values


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(4, 32, method="rtn"),
        QuantizeConfig(4, 64, asymmetric=True, method="rtn", trunk="int8"),
        QuantizeConfig(8, 32, method="rtn", trunk="int4"),
        QuantizeConfig(8, 64, asymmetric=True, method="rtn", trunk="int4"),
    ],
    ids=["int4", "int4, zero points, trunk int8", "int8, trunk int4", "int8, zero points, trunk int4"],
)
def test_compressed_tensors_reads_what_was_rounded(config: QuantizeConfig, model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q", config)
    found = decompressed(tmp_path / "q")
    floats = load_file(model / "model.safetensors")
    checked = 0
    for name, value in floats.items():
        grouping = None
        if ".experts." in name:
            grouping = config.experts
        elif "self_attn" in name:
            grouping = config.attention
        if grouping is None:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
            continue
        rounded = round_to_nearest(value, grouping)
        np.testing.assert_allclose(found[name].float().numpy(), rounded.values(), rtol=1e-6, atol=1e-7)
        checked += 1
    assert checked == LAYERS * (EXPERTS * 3 + 4 * (config.attention is not None))
    assert found.keys() == floats.keys()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@torch.inference_mode()
def test_transformers_loads_it(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig

    config = QuantizeConfig(4, 32, method=method, trunk="int8", calibration_text=text, calibration_tokens=256)  # type: ignore[arg-type]
    quantize(model, tmp_path / "q", config)
    theirs = MixtralForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    plain = MixtralForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    values = decompressed(tmp_path / "q")
    for layer in range(LAYERS):
        stacked = theirs.model.layers[layer].mlp.experts
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            both = torch.cat([values[f"{stem}w1.weight"], values[f"{stem}w3.weight"]])
            torch.testing.assert_close(stacked.gate_up_proj[expert].float(), both, rtol=0, atol=1e-2)
            torch.testing.assert_close(stacked.down_proj[expert].float(), values[f"{stem}w2.weight"], rtol=0, atol=1e-2)
    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(1))
    ours, exact = theirs(ids).logits, plain(ids).logits
    assert float((ours - exact).square().mean() / exact.square().mean()) < 0.1


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_moe_ray_reads_the_same_and_in_its_own_bits(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(4, 32, asymmetric=True, method=method, calibration_text=text, calibration_tokens=128)  # type: ignore[arg-type]
    quantize(model, tmp_path / "q", config)
    theirs = decompressed(tmp_path / "q")
    checkpoint = Checkpoint.open(tmp_path / "q")
    for weight in weights_of_model(checkpoint.config):
        name = checkpoint.place(weight).named("weight")
        stored = checkpoint.find(weight)
        assert stored.grouping == (None if weight.expert is None else config.experts)
        torch.testing.assert_close(checkpoint.read(weight, torch.float32), theirs[name].float(), rtol=1e-6, atol=1e-7)
    checkpoint.close()


def correlated_inputs(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    mixed = torch.randn(width // 4, width, generator=generator)
    return torch.randn(rows, width // 4, generator=generator) @ mixed + 0.3 * torch.randn(
        rows, width, generator=generator
    )


@pytest.mark.parametrize(
    "grouping",
    [Grouping(4, 32), Grouping(4, 64, offsets=True), Grouping(4, 128), Grouping(8, 256), Grouping(4, 192)],
    ids=lambda how: f"{how.bits} bits, group {how.group}",
)
def test_gptq_changes_outputs_less_than_rounding(grouping: Grouping) -> None:
    width = 768 if grouping.group == 192 else 256
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(2))
    inputs = correlated_inputs(600, width)
    hessian = inputs.T @ inputs
    rounded, adapted = round_to_nearest(weight, grouping), gptq(weight, hessian, IntegerGrid(grouping))
    losses = [output_error(torch.from_numpy(codes.values()) - weight, hessian) for codes in (rounded, adapted)]
    assert losses[1] < 0.7 * losses[0]
    held_out = correlated_inputs(1200, width)[600:]
    changes = [
        float((held_out @ (torch.from_numpy(codes.values()) - weight).T).square().sum()) for codes in (rounded, adapted)
    ]
    assert changes[1] < 0.8 * changes[0]


def test_gptq_of_uncorrelated_inputs_is_rounding() -> None:
    """With a diagonal Hessian nothing can make up for an error: the codes are the nearest ones."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))
    how = Grouping(4, 32)
    assert np.array_equal(
        gptq(weight, 3.0 * torch.eye(128), IntegerGrid(how)).codes, round_to_nearest(weight, how).codes
    )


def test_gptq_follows_the_papers_recursion() -> None:
    """The same as the paper's update, one column at a time, with the inverse Hessian shrunk by elimination in float64.

    Equation 2 and 3 of arXiv:2210.17323: the rest of a row takes -(error / [H^-1]qq) * [H^-1]q,: of what is left.
    """
    how, damping = Grouping(8, 256), 0.01
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(6))
    inputs = correlated_inputs(500, 256)
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, IntegerGrid(how), damping=damping)
    rest = weight.double().clone()
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(256, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    scale = torch.from_numpy(found.scales[:, :1]).double()
    same = 0
    for column in range(256):
        code = (rest[:, column : column + 1] / scale).round().clamp(-128, 127)
        same += int((code[:, 0] + 128 == torch.from_numpy(found.codes[:, column]).double()).sum())
        error = (rest[:, column : column + 1] - code * scale) / inverse[column, column]
        rest -= error @ inverse[column : column + 1]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert same >= 0.995 * 12 * 256  # float32 falls to the other side of a step here and there


def test_act_order_is_said_and_read_back() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(7))
    inputs = correlated_inputs(400, 128) * torch.linspace(0.1, 3, 128)
    hessian = inputs.T @ inputs
    codes = gptq(weight, hessian, IntegerGrid(Grouping(4, 32)), act_order=True)
    assert codes.grouping.reordered
    assert codes.order is not None
    assert codes.order[0] == int(hessian.diagonal().argmax())
    assert output_error(torch.from_numpy(codes.values()) - weight, hessian) < output_error(
        torch.from_numpy(round_to_nearest(weight, Grouping(4, 32)).values()) - weight, hessian
    )


def test_inputs_that_were_never_seen_are_rounded_by_themselves() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    inputs = correlated_inputs(200, 64)
    inputs[:, 5:9] = 0.0
    values = gptq(weight, inputs.T @ inputs, IntegerGrid(Grouping(8, 64))).values()
    np.testing.assert_allclose(values[:, 5:9], weight.numpy()[:, 5:9], atol=0.03)


def test_awq_scales_up_what_is_large() -> None:
    inputs = correlated_inputs(500, 128)
    inputs[:, 7] *= 40.0
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(11))
    size = inputs.abs().mean(0)
    found = search([weight], inputs, size, Grouping(4, 64))
    assert found.best > 0
    assert found.gain > 0.3
    scale = scale_of(size, found.best)
    assert int(scale.argmax()) == 7


@torch.inference_mode()
def test_folding_a_scale_changes_no_output(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    weights = LayerTensors.read(TrunkWeights(checkpoint, torch.float32, torch.device("cpu")), 0)
    states = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    folded, really = one_layer.fold(weights, scale, torch.bfloat16)
    torch.testing.assert_close(really, scale, rtol=2**-7, atol=0)
    torch.testing.assert_close(states * folded.post_norm * really, states * weights.post_norm, rtol=1e-5, atol=1e-6)
    before, after = (states * layer.post_norm @ layer.gate.T for layer in (weights, folded))
    torch.testing.assert_close(after, before, rtol=0, atol=2**-7 * float(before.abs().max()))


@torch.inference_mode()
def test_a_calibration_run_is_the_model(model: Path) -> None:
    """Every layer's output is transformers'; what is quantised is calibrated on what it really sees."""
    reference = MixtralForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    windows = [list(range(5, 45)), list(range(100, 117))]
    expected = torch.cat(
        [reference.model(torch.tensor([window]), output_hidden_states=True).last_hidden_state[0] for window in windows]
    )
    checkpoint = Checkpoint.open(model)
    config, floats = checkpoint.config, load_file(model / "model.safetensors")
    trunk = TrunkWeights(checkpoint, torch.float32, torch.device("cpu"))
    run = CalibrationRun(config, windows, trunk.embed())
    for layer in range(LAYERS):
        weights = LayerTensors.read(trunk, layer)
        run.add(run.attended(run.attention_inputs(weights), weights.qkv) @ weights.out.T)
        states = run.expert_states(weights.post_norm)
        chosen, routing = run.route(states, weights.gate)
        added = torch.zeros_like(states)
        for expert in range(EXPERTS):
            w1, w3, w2 = (
                floats[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"].float()
                for part in ("w1", "w3", "w2")
            )
            share = ((chosen == expert) * routing).sum(-1, keepdim=True)
            added += share * (run.inner(states, w1, w3) @ w2.T)
        run.add(added)
    norm = trunk.norm()
    variance = run.hidden.square().mean(-1, keepdim=True)
    torch.testing.assert_close(
        run.hidden * (variance + config.rms_norm_eps).rsqrt() * norm, expected, rtol=1e-4, atol=1e-4
    )


def test_an_expert_with_few_tokens_borrows_others() -> None:
    states = torch.randn(100, 8)
    chosen = torch.tensor([[0, 1]] * 97 + [[1, 2]] * 3)
    routing = torch.tensor([[0.6, 0.4]] * 100)
    rich, poor, never = (expert_inputs(states, chosen, routing, expert, 50) for expert in (1, 2, 3))
    assert (rich.own, len(rich.rows)) == (100, 100)
    torch.testing.assert_close(rich.weights, torch.tensor([0.16] * 97 + [0.36] * 3))
    assert (poor.own, len(poor.rows)) == (3, 100)
    assert float(poor.weights[:97].max()) < 0.1 * float(routing.square().mean())
    assert float(poor.weights[:97].min()) > 0
    assert (never.own, len(never.rows)) == (0, 100)
    assert float(never.weights.min()) > 0


def test_what_each_expert_saw_is_reported_and_warned_of(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = QuantizeConfig(4, 64, method="gptq", calibration_text=text, calibration_tokens=200)
    report = quantize(model, tmp_path / "q", config)
    assert report.calibration_tokens == 200
    assert [sum(layer.tokens) for layer in report.layers] == [400] * LAYERS
    assert "few tokens of the calibration text reach expert 0" in caplog.text
    assert json.loads((tmp_path / "q" / "quantize.json").read_text())["layers"][0]["tokens"] == list(
        report.layers[0].tokens
    )


def test_it_is_all_there_or_nothing(model: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == EXPERTS:
            raise RuntimeError("stopped")

    config = QuantizeConfig(4, 32, method="rtn", shard_bytes=100_000)
    with pytest.raises(RuntimeError, match="stopped"):
        quantize(model, tmp_path / "q", config, stop)
    assert list(tmp_path.iterdir()) == []
    report = quantize(model, tmp_path / "q", config)
    files = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert report.total_bytes < report.source_bytes
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(model, tmp_path / "q", config)
    quantize(model, tmp_path / "q", config, overwrite=True)
    with pytest.raises(CheckpointError, match="write the quantised one elsewhere"):
        quantize(model, model, config, overwrite=True)


def test_groups_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"`gate` has 64 inputs, no multiple of a group size of 128.*fits: 32 or 64"
    ):
        quantize(model, tmp_path / "q", QuantizeConfig(4, 128, method="rtn"))
    with pytest.raises(ConfigError, match="`group_size` must be 32, 64 or 128, got 48"):
        QuantizeConfig(4, 48)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match="no text in it"):
        quantize(model, tmp_path / "q", QuantizeConfig(calibration_text=tmp_path / "empty"))
    with pytest.raises(ConfigError, match="No such file"):
        quantize(model, tmp_path / "q", QuantizeConfig(calibration_text=tmp_path / "none"))


def test_the_command(model: Path, tmp_path: Path) -> None:
    words = ["convert", "quantize", str(model), "-o", str(tmp_path / "q"), "--method", "rtn", "--bits", "8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "q" / "quantize.json").read_text())["config"]["bits"] == 8
