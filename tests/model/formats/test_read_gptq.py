"""GPTQ checkpoints are read as AutoGPTQ's own QuantLinear computes with them (its PyTorch code, no CUDA)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packages
import pytest
import quantised
import torch
from quantised import W1

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.formats import Grouping
from moe_ray.model.surplus import check_surplus


def theirs(values: torch.Tensor, bits: int, group: int, sym: bool, order: torch.Tensor | None = None) -> quantised.Made:
    """Packed by AutoGPTQ, and its output for the unit matrix: the values, in float32."""
    n, k = values.shape
    size = k if group == -1 else group
    index = torch.arange(k, dtype=torch.int32) // size
    if order is not None:
        index = index[order]
    groups = int(index.max()) + 1
    scales, zeros = torch.empty(n, groups), torch.empty(n, groups)
    top = 2**bits - 1
    for g in range(groups):
        part = values[:, index == g]
        low, high = part.amin(1).clamp(max=-1e-4), part.amax(1).clamp(min=1e-4)
        if sym:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        scales[:, g] = ((high - low) / top).half().float()
        # the first version cannot store a zero point of 0
        zeros[:, g] = torch.full((n,), 2.0 ** (bits - 1)) if sym else (-low / scales[:, g]).round().clamp(1, top)
    which = "qlinear_cuda_old" if order is None and k % size == 0 else "qlinear_cuda"
    path = f"auto_gptq/nn_modules/qlinear/{which}.py"
    layer = packages.file_of("auto-gptq", path).QuantLinear(bits, group, k, n, False, weight_dtype=torch.float32)
    codes = ((values / scales[:, index]).round() + zeros[:, index]).clamp(0, top)
    exact = torch.nn.Linear(k, n, bias=False)
    exact.weight.data = (codes - zeros[:, index]) * scales[:, index]
    layer.pack(exact, scales.clone(), zeros.clone(), index)
    layer.g_idx = index
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    with torch.no_grad():
        computed = layer(torch.eye(k)).T
    return {**tensors, "scales": tensors["scales"].half()}, computed


def settings(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **more}


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_first_version(bits: int, group: int, sym: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, bits, group, sym), settings(bits, group))
    grouping = {"bits": max(bits, 4), "offsets": not sym}
    quantised.read_equals(
        written, caplog, "gptq", lambda shape: Grouping(group=shape[1] if group == -1 else group, **grouping)
    )


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_order_of_activations(bits: int, even: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """desc_act: inputs lie in groups by the size of their activations; where the last group is smaller, as floats."""
    random = torch.Generator().manual_seed(4)
    group = 32 if even else 48

    def packed(values: torch.Tensor) -> quantised.Made:
        return theirs(values, bits, group, False, torch.randperm(values.shape[1], generator=random))

    written = quantised.write(tmp_path, packed, settings(bits, group, desc_act=True))
    grouping = Grouping(bits, group, offsets=True, reordered=True) if even else None
    quantised.read_equals(written, caplog, "gptq", lambda shape: grouping)


def test_a_last_group_that_is_smaller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 4, 48, True), settings(4, 48))
    quantised.read_equals(written, caplog, "gptq", lambda shape: None)
    written.change(g_idx=None)
    quantised.refused(tmp_path, W1 + "qweight", f"3 groups of 48 for 128 inputs, and no {W1}g_idx")


@pytest.mark.parametrize("bits", [4, 8])
def test_second_version(bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Zero points as they are, 0 among them. Its words are GPTQModel's conversion of the first: each code one more."""

    def packed(values: torch.Tensor) -> quantised.Made:
        tensors, computed = theirs(values, bits, 32, False)
        ones = sum(1 << at for at in range(0, 32, bits))
        # no code is the greatest: none carries into its neighbour
        tensors["qzeros"] = ((tensors["qzeros"].long() + ones) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        return tensors, computed

    written = quantised.write(tmp_path, packed, settings(bits, 32, checkpoint_format="gptq_v2"))
    quantised.read_equals(written, caplog, "gptq_v2", lambda shape: Grouping(bits, 32, offsets=True))


def test_as_auto_gptq_names_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 4, 32, True), None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    weight, values = next((w, v) for w, v in written.expected.items() if w.role == "gate")
    assert torch.equal(checkpoint.read(weight, torch.float32), values)
    shards = dict.fromkeys(checkpoint.files, "gptq_model-4bit-32g-00001-of-00001.safetensors")
    (tmp_path / "gptq_model-4bit-32g.safetensors").rename(tmp_path / next(iter(shards.values())))
    (tmp_path / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(Checkpoint.open(tmp_path).read(weight, torch.float32), values)


def test_biases_of_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """AutoGPTQ wrote them for every layer until 2024."""

    def with_bias(values: torch.Tensor) -> quantised.Made:
        tensors, computed = theirs(values, 4, 128, True)
        return {**tensors, "bias": torch.zeros(len(values), dtype=torch.float16)}, computed

    written = quantised.write(tmp_path, with_bias, settings(4, 128))
    quantised.read_equals(written, caplog, "gptq", lambda shape: Grouping(4, 128))
    written.change(bias=torch.ones(256))
    with pytest.raises(CheckpointError, match=f"{W1}bias: a bias, and a mixtral model has none"):
        check_surplus(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qzeros": None}, ["qweight", "qzeros is missing beside it"]),
        ({"scales": None}, ["qweight", "scales is missing beside it"]),
        ({"qweight": torch.zeros(7, 256, dtype=torch.int32)}, ["qweight", "shape [7, 256]: not"]),
        ({"qweight": torch.zeros(16, 256)}, ["qweight", "dtype F32, supported: I32"]),
        ({"qweight": None}, [f"tensor {W1}weight is missing"]),
        ({"scales": torch.ones(4, 128)}, ["scales", "shape [4, 128]", "implies [4, 256]"]),
        ({"qzeros": torch.zeros(4, 16, dtype=torch.int32)}, ["qzeros", "shape [4, 16]", "implies [4, 32]"]),
        ({"g_idx": torch.full((128,), 4, dtype=torch.int32)}, ["g_idx", "damaged: groups 4 to 4", "0 to 3"]),
        ({"g_idx": torch.arange(128, dtype=torch.int32) - 2}, ["g_idx", "damaged: groups -2 to 125"]),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, ["g_idx", "I32 of shape [64], I32 of [128] expected"]),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 4, 32, False), settings(4, 32))
    quantised.refused(written.change(**change), *named)


def test_no_file_says_which_version_it_is(tmp_path: Path) -> None:
    quantised.write(tmp_path, lambda values: theirs(values, 4, 32, False), None)
    quantised.refused(tmp_path, "qweight", "neither config.json nor quantize_config.json says of which")
