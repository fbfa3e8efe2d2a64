"""FP8 checkpoints are read as transformers' fine-grained FP8 and compressed-tensors dequantise them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
from fp8_weights import ROW, TENSOR, Block, theirs

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.formats import Grouping
from moe_ray.model.formats.grouped import Float8
from moe_ray.model.weights import matrices_of_expert


def grouped(block: Block, kind: Float8 = "e4m3") -> Callable[[tuple[int, ...]], Grouping]:
    """What weights are grouped as, by their shape."""
    return lambda shape: Grouping(8, block[1] or shape[1], float8=kind)


@pytest.mark.parametrize(
    ("block", "name", "dtype", "config"),
    [
        ((64, 64), "weight_scale_inv", torch.float32, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        ((64, 128), "weight_scale_inv", torch.bfloat16, {"quant_method": "fp8", "weight_block_size": [64, 128]}),
        ((64, 64), "weight_scale_inv", torch.float8_e8m0fnu, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
        (TENSOR, "weight_scale", torch.float32, {"quant_method": "fp8", "activation_scheme": "static"}),
        (TENSOR, "weight_scale", torch.bfloat16, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (ROW, "weight_scale", torch.float32, {"quant_method": "fbgemm_fp8"}),
        (ROW, "weight_scale", torch.bfloat16, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
    ids=str,
)
def test_scales(
    block: Block,
    name: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def packed(values: torch.Tensor) -> quantised.Made:
        tensors, read = theirs(values, block, name, dtype)
        return {**tensors, "input_scale": torch.ones(())}, read

    written = quantised.write(tmp_path, packed, config)
    quantised.read_equals(written, caplog, "fp8", grouped(block))


@pytest.mark.parametrize("block", [(64, 64), ROW])
def test_e5m2(block: Block, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def packed(values: torch.Tensor) -> quantised.Made:
        return theirs(values, block, "weight_scale_inv", torch.float32, torch.float8_e5m2)

    written = quantised.write(tmp_path, packed, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    quantised.read_equals(written, caplog, "fp8", grouped(block, "e5m2"))


@pytest.mark.parametrize(
    ("kind", "bits"), [(torch.float8_e4m3fn, 0x7F), (torch.float8_e4m3fn, 0xFF), (torch.float8_e5m2, 0xFC)]
)
def test_what_is_no_number_is_no_code(kind: torch.dtype, bits: int, tmp_path: Path) -> None:
    """Kernels that take codes apart know no such values."""

    def packed(values: torch.Tensor) -> quantised.Made:
        tensors, read = theirs(values, TENSOR, "weight_scale", torch.float32, kind)
        tensors["weight"].view(torch.uint8)[-1, 3] = bits
        return tensors, read

    quantised.write(tmp_path, packed, {"quant_method": "fp8"})
    checkpoint = Checkpoint.open(tmp_path)
    matrix = checkpoint.matrix(matrices_of_expert(checkpoint.config, 0, 0)[0])
    with pytest.raises(CheckpointError, match=r"w1\.weight: not all of its weights are finite numbers"):
        matrix.codes()


def test_compressed_tensors_agrees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("compressed_tensors", reason="the reference")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[96, 96])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")

    def packed(values: torch.Tensor) -> quantised.Made:
        """Blocks of 96 do not divide 128 and 256: the last ones are smaller."""
        n, k = values.shape
        padded = torch.nn.functional.pad(values, (0, -k % 96, 0, -n % 96))
        blocks = padded.reshape(padded.shape[0] // 96, 96, padded.shape[1] // 96, 96)
        scale = blocks.abs().amax((1, 3)) / 448
        state = compressor.compress({"weight": values, "weight_scale": scale}, scheme)
        assert state["weight"].dtype == torch.float8_e4m3fn
        return state, compressor.decompress(dict(state), scheme)["weight"]

    groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    written = quantised.write(tmp_path, packed, config)
    quantised.read_equals(written, caplog, "fp8", lambda shape: None)


@pytest.mark.parametrize("name", ["scale_inv", "weight_scale"])
@pytest.mark.parametrize("block", [(64, 64), ROW])
def test_stacked(block: Block, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts as transformers 5 stacks them; what has tensors of its own is in floats."""
    plain = (*quantised.PLAIN, "q", "k", "v", "out")
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    written = quantised.write(
        tmp_path, lambda values: theirs(values, block, name, torch.float32), config, plain, layout=1
    )
    quantised.read_equals(written, caplog, "fp8", grouped(block))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_scale_inv": None}, ["w1.weight", "none of", "w1.weight_scale_inv", "w1.weight_scale beside it"]),
        ({"weight_scale_inv": torch.ones(4, 3)}, ["w1.weight_scale_inv", "shape [4, 3]: not one for each [64, 64]"]),
        ({"weight_scale_inv": torch.ones(4, 2, 1)}, ["w1.weight_scale_inv", "shape [4, 2, 1]"]),
        ({"weight_scale_inv": torch.ones(4, 2).int()}, ["w1.weight_scale_inv", "dtype I32, supported: F32"]),
        ({"weight": torch.ones(128, 256).to(torch.float8_e4m3fn)}, ["w1.weight", "config.json implies [256, 128]"]),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(
        tmp_path,
        lambda values: theirs(values, (64, 64), "weight_scale_inv", torch.float32),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    )
    quantised.refused(written.change(**change), *named)
