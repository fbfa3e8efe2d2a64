"""HQQ checkpoints are read as the package hqq dequantises them."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised
import torch

from moe_ray.model.formats import Grouping

hqq = pytest.importorskip("hqq.core.quantize", reason="the reference (pip install --no-deps hqq termcolor)")


def theirs(values: torch.Tensor, bits: int, group: int, axis: int, as_float: bool = False) -> quantised.Made:
    linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
    linear.weight.data = values
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=as_float)
    layer = hqq.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    meta = dict(layer.meta)  # it computes in the dtype of the scales
    meta |= {"scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
    return layer.state_dict(), hqq.Quantizer.dequantize(layer.W_q, meta)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 64), (2, 32), (1, 32)])
def test_bits(
    bits: int, group: int, axis: int, as_float: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = quantised.write(
        tmp_path, lambda values: theirs(values, bits, group, axis, as_float), {"quant_method": "hqq"}
    )
    grouping = Grouping(max(bits, 4), group, offsets=True) if axis else None
    quantised.read_equals(written, caplog, "hqq", lambda shape: grouping, absolute=1e-7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": None}, ["w1.W_q", "w1.scale is missing beside it"]),
        ({"nbits": torch.tensor(3, dtype=torch.int32)}, ["w1.nbits", "3 bits are not read; read are 8, 4, 2, 1"]),
        ({"quant_zero": torch.tensor(1, dtype=torch.uint8)}, ["w1.W_q", "zero points that are quantised themselves"]),
        ({"shape": torch.tensor([128, 256])}, ["w1.shape", "[128, 256], config.json implies [256, 128]"]),
        ({"zero": torch.ones(1, 512)}, ["w1.scale", "shapes [512, 1] and [1, 512]"]),
        ({"W_q": torch.zeros(128, 64, dtype=torch.uint8)}, ["w1.W_q", "8192 bytes: not 4 bits for each of 512 x 64"]),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 4, 64, 1), {"quant_method": "hqq"})
    quantised.refused(written.change(**change), *named)
