"""FP8 checkpoints are read as transformers' fine-grained FP8 and compressed-tensors dequantise them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantised
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

TENSOR, ROW = (None, None), (1, None)


def theirs(values: torch.Tensor, block: tuple[int | None, int | None], name: str, dtype: torch.dtype) -> quantised.Made:
    """Quantised here; `Fp8Dequantize` reads any even grid of scales."""
    n, k = values.shape
    high, wide = block[0] or n, block[1] or k
    blocks = values.reshape(n // high, high, k // wide, wide)
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp(min=1e-6)
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.log2(scale).ceil())
    scale = scale.to(dtype)
    weight = (blocks / scale.float()).reshape(n, k).to(torch.float8_e4m3fn)
    grid = scale.reshape(n // high, k // wide)
    values = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, grid, torch.float32)
    return {"weight": weight, name: grid.reshape(()) if block == TENSOR else grid}, values


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
    block: tuple[int | None, int | None],
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
    quantised.read_equals(written, caplog, "fp8", lambda shape: None)


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
def test_stacked(
    block: tuple[int | None, int | None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts as transformers 5 stacks them; what has tensors of its own is in floats."""
    plain = (*quantised.PLAIN, "q", "k", "v", "out")
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    written = quantised.write(
        tmp_path, lambda values: theirs(values, block, name, torch.float32), config, plain, layout=1
    )
    quantised.read_equals(written, caplog, "fp8", lambda shape: None)


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
