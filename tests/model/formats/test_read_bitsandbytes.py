"""bitsandbytes checkpoints are read as bitsandbytes dequantises them on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised
import torch

from moe_ray.model.formats import Grouping

bnb = pytest.importorskip("bitsandbytes.functional", reason="the reference")

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
STATE = "weight.quant_state.bitsandbytes__nf4"


def four_bits(values: torch.Tensor, kind: str, block: int, nested: bool) -> quantised.Made:
    """As Params4bit saves it. The state's dtype is that of the values before: float32, to see every bit."""
    packed, state = bnb.quantize_4bit(values, blocksize=block, compress_statistics=nested, quant_type=kind)
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    # In one row: the CPU kernel of 0.50 gives other values than its quantiser meant where a block spans two rows.
    state.shape = torch.Size([1, values.numel()])
    return {"weight": packed, **tensors}, bnb.dequantize_4bit(packed, state).reshape(values.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits(kind: str, block: int, nested: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = ("embed", "input_norm", "post_norm", "norm", "head")  # it quantises routers, too
    written = quantised.write(tmp_path, lambda values: four_bits(values, kind, block, nested), FOUR, plain)
    levels = tuple(map(float, bnb.get_4bit_type(kind, device="cpu")))
    quantised.read_equals(
        written, caplog, f"bitsandbytes-{kind}", lambda shape: Grouping(4, block, levels=levels), relative=1e-6
    )


def test_blocks_that_span_rows_come_as_floats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(
        tmp_path, lambda values: four_bits(values, "nf4", 64, True), FOUR, hidden_size=96, head_dim=32, vocab_size=63
    )
    grouping = {96: None, 128: 64, 256: 64}  # inputs → the size of a group
    levels = tuple(map(float, bnb.get_4bit_type("nf4", device="cpu")))
    quantised.read_equals(
        written,
        caplog,
        "bitsandbytes-nf4",
        lambda shape: Grouping(4, group, levels=levels) if (group := grouping[shape[1]]) else None,
        relative=1e-6,
    )


def eight_bits(values: torch.Tensor) -> quantised.Made:
    codes, scales, _ = bnb.int8_vectorwise_quant(values.half())
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, bnb.int8_vectorwise_dequant(codes, scales)


def test_8_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(tmp_path, eight_bits, EIGHT)
    quantised.read_equals(written, caplog, "bitsandbytes-int8", lambda shape: Grouping(8, shape[1]), absolute=1e-7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({STATE: None}, ["w1.weight", "bitsandbytes__nf4", "bitsandbytes__fp4 beside it"]),
        ({STATE: torch.zeros(3, dtype=torch.uint8)}, [STATE, "no JSON with shape and blocksize"]),
        ({"weight.absmax": None}, ["w1.weight", "w1.weight.absmax is missing beside it"]),
        ({"weight.absmax": torch.ones(512)}, ["w1.weight.absmax", "dtype F32, supported: U8"]),
        ({"weight.nested_absmax": None}, ["w1.weight.nested_absmax is missing beside it"]),
        ({"weight.nested_absmax": torch.ones(3)}, ["w1.weight.nested_absmax", "shape [3]", "implies [2]"]),
        ({"weight.quant_map": torch.ones(15)}, ["w1.weight.quant_map", "implies [16]"]),
        ({"weight": torch.zeros(100, 1, dtype=torch.uint8)}, ["w1.weight", "config.json implies [16384, 1]"]),
    ],
    ids=str,
)
def test_damage_of_4_bits(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(tmp_path, lambda values: four_bits(values, "nf4", 64, True), FOUR)
    quantised.refused(written.change(**change), *named)


def test_another_shape_in_the_state(tmp_path: Path) -> None:
    written = quantised.write(tmp_path, lambda values: four_bits(values, "nf4", 64, True), FOUR)
    _, state = bnb.quantize_4bit(torch.randn(128, 256), quant_type="nf4")
    written.change(**{STATE: state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]})
    quantised.refused(tmp_path, STATE, "shape [128, 256], config.json implies [256, 128]")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"SCB": None}, ["w1.weight", "weight_scale is missing beside it"]),
        ({"SCB": torch.ones(128)}, ["w1.SCB", "shape [128]", "implies [256]"]),
        ({"weight": torch.zeros(128, 256, dtype=torch.int8)}, ["w1.weight", "config.json implies [256, 128]"]),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, ["w1.weight_format", "2: an order for one kind of"]),
    ],
    ids=str,
)
def test_damage_of_8_bits(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(tmp_path, eight_bits, EIGHT)
    quantised.refused(written.change(**change), *named)
