"""Ternary checkpoints are read as scales times -1, 0 and 1, in 4 bits where kernels compute, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import quantised
import torch
from backends import open_backend

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.formats import GroupedCodes, Grouping, Place
from moe_ray.model.formats.ternary import METHOD, pack_ternary
from moe_ray.model.weights import weights_of_expert

KEY = (1, 2)
SETTINGS = {"quant_method": METHOD, "bits": 1.0}
STEM = "w"


def theirs(values: torch.Tensor) -> quantised.Made:
    """A fifth of the values, the largest ones, as 1 or -1 times a scale of the row."""
    largest = values.abs().quantile(0.8, dim=1, keepdim=True)
    levels = torch.where(values.abs() > largest, values.sign(), 0.0)
    scale = (1.3 * largest).bfloat16().float()
    codes = (levels + 8).to(torch.uint8).numpy()
    packed = pack_ternary(Place(STEM), GroupedCodes(Grouping(4, values.shape[1]), codes, scale.numpy()))
    return {name.removeprefix(f"{STEM}."): tensor for name, tensor in packed.items()}, levels * scale


def test_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the trunk's matrices as well: nothing says that a ternary weight is an expert's."""
    written = quantised.write(tmp_path, theirs, SETTINGS)
    quantised.read_equals(written, caplog, "ternary", lambda shape: Grouping(4, shape[1]))
    stored = Checkpoint.open(tmp_path).find(next(weight for weight in written.expected if weight.expert is not None))
    assert 8 * stored.nbytes < 1.15 * stored.shape[0] * stored.shape[1]


def test_columns_in_another_order_are_written_in_their_own() -> None:
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    plain = ((values.sign() + 8).to(torch.uint8).numpy(), np.ones((16, 1), np.float32))
    ordered = GroupedCodes(Grouping(4, 64, reordered=True), plain[0][:, order], plain[1], order=order)
    packed = [pack_ternary(Place(STEM), codes) for codes in (GroupedCodes(Grouping(4, 64), *plain), ordered)]
    for name, tensor in packed[0].items():
        assert torch.equal(packed[1][name], tensor)


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_kernels_hold_it_in_4_bits(quantize: str | None, tmp_path: Path) -> None:
    written = quantised.write(tmp_path, theirs, SETTINGS)
    checkpoint = Checkpoint.open(tmp_path)
    reader = ExpertReader(checkpoint, [KEY], open_backend("native float32"), quantize=quantize)
    assert reader.layout.format == "int4 in groups of 128, down int4 in groups of 256"
    ffn = reader.read(KEY)
    gate, up, down = (written.expected[weight].double() for weight in weights_of_expert(checkpoint.config, *KEY))
    x = torch.randn(5, gate.shape[1], generator=torch.Generator().manual_seed(3))
    exact = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    error = (ffn.forward(x, torch.ones(5)).double() - exact).abs().max() / exact.abs().max()
    assert error < 3e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_scale": None}, ["w1.weight_words", "w1.weight_scale is missing beside it"]),
        ({"weight_dictionary": None}, ["w1.weight_words", "w1.weight_dictionary is missing beside it"]),
        ({"weight_dictionary": torch.tensor([8])}, ["w1.weight_dictionary", "dtype I64, supported: U16"]),
        (
            {"weight_dictionary": torch.tensor([7], dtype=torch.uint16)},
            ["w1.weight_dictionary", "dictionary 7, there are 1, 2, 4"],
        ),
        (
            {"weight_dictionary": torch.tensor([8, 8], dtype=torch.uint16)},
            ["w1.weight_dictionary", "shape [2], the format implies [1]"],
        ),
        ({"weight_scale": torch.ones(255)}, ["w1.weight_scale", "shape [255]"]),
        ({"weight_words": torch.zeros(9, dtype=torch.int16)}, ["w1.weight_words", "dtype I16, supported: U16"]),
        ({"weight_words": torch.zeros(0, dtype=torch.uint16)}, ["w1.weight_words", "shape [0]: not words of 32768"]),
        (
            {"weight_words": torch.zeros(32769, dtype=torch.uint16)},
            ["w1.weight_words", "shape [32769]: not words of 32768 digits"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_damage_that_headers_show(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    quantised.refused(quantised.write(tmp_path, theirs, SETTINGS).change(**change), *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (torch.full((40,), 65535, dtype=torch.uint16), "word 65535, there are 65535"),
        (torch.arange(40).to(torch.uint16), r"words of \d+ digits, for 32768"),
        (torch.arange(32768).to(torch.uint16), r"words of \d+ digits, for 32768"),
    ],
    ids=["no such word", "too few", "too many"],
)
def test_damage_that_words_show(words: torch.Tensor, named: str, tmp_path: Path) -> None:
    """File and tensor are named, by what reads floats and by what reads codes."""
    directory = quantised.write(tmp_path, theirs, SETTINGS).change(weight_words=words)
    checkpoint = Checkpoint.open(directory)
    weight = weights_of_expert(checkpoint.config, 0, 0)[0]
    where = rf"model\.safetensors: tensor .*experts\.0\.w1\.weight_words: damaged: {named}"
    with pytest.raises(CheckpointError, match=where):
        checkpoint.read(weight, torch.float32)
    with pytest.raises(CheckpointError, match=where):
        checkpoint.matrix(weight).codes()
