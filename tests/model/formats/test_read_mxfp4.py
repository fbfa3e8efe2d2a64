"""MXFP4 checkpoints are read as transformers reads gpt-oss's, and as compressed-tensors decompresses its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised
import torch
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from moe_ray.model.formats import Grouping

GROUPING = Grouping(4, 32, levels=tuple(FP4_VALUES))
RANDOM = torch.Generator().manual_seed(6)


def theirs(values: torch.Tensor) -> quantised.Made:
    """Any bytes are codes: there is nothing to pack."""
    n, k = values.shape
    blocks = torch.randint(0, 256, (n, k // 32, 16), generator=RANDOM).to(torch.uint8)
    scales = torch.randint(100, 130, (n, k // 32), generator=RANDOM).to(torch.uint8)
    read = convert_moe_packed_tensors(blocks.unsqueeze(0), scales.unsqueeze(0), dtype=torch.float32)
    return {"blocks": blocks, "scales": scales}, read[0].T


def test_stacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = (*quantised.PLAIN, "q", "k", "v", "out")
    written = quantised.write(tmp_path, theirs, {"quant_method": "mxfp4"}, plain, layout=1)
    quantised.read_equals(written, caplog, "mxfp4", lambda shape: GROUPING)


def test_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def named(values: torch.Tensor) -> quantised.Made:
        tensors, read = theirs(values)
        return {f"weight_{suffix}": tensor for suffix, tensor in tensors.items()}, read

    written = quantised.write(tmp_path, named, {"quant_method": "mxfp4"})
    quantised.read_equals(written, caplog, "mxfp4", lambda shape: GROUPING)


def test_compressed_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("compressed_tensors", reason="the reference")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    scheme: QuantizationScheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")

    def packed(values: torch.Tensor) -> quantised.Made:
        tensors, _ = theirs(values)
        n, k = values.shape
        state = {"weight_packed": tensors["blocks"].reshape(n, k // 2), "weight_scale": tensors["scales"]}
        return state, compressor.decompress(dict(state), scheme)["weight"]

    written = quantised.write(
        tmp_path, packed, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    )
    quantised.read_equals(written, caplog, "mxfp4", lambda shape: GROUPING)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_scales": None}, ["w1.weight_blocks", "weight_scales is missing beside it"]),
        ({"weight_scales": torch.ones(256, 4)}, ["w1.weight_scales", "dtype F32, supported: U8"]),
        ({"weight_scales": torch.zeros(256, 2).byte()}, ["w1.weight_scales", "[256, 2], config.json implies [256, 4]"]),
        ({"weight_blocks": torch.zeros(256, 4, 8).byte()}, ["w1.weight_blocks", "config.json implies [256, 4, 16]"]),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    def own(values: torch.Tensor) -> quantised.Made:
        tensors, read = theirs(values)
        return {f"weight_{suffix}": tensor for suffix, tensor in tensors.items()}, read

    written = quantised.write(tmp_path, own, {"quant_method": "mxfp4"})
    quantised.refused(written.change(**change), *named)
