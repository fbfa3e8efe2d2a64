"""AWQ checkpoints are read as AutoAWQ's `dequantize_gemm` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packages
import pytest
import quantised
import torch

from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.formats import Grouping

RANDOM = torch.Generator().manual_seed(5)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=RANDOM).to(torch.int32)


def theirs(values: torch.Tensor, group: int, zero_point: bool) -> quantised.Made:
    """Any words are codes: there is nothing to pack. Scales are float32 there, for it computes in their dtype."""
    n, k = values.shape
    size = k if group == -1 else group
    zeros = words(k // size, n // 8) if zero_point else torch.full((k // size, n // 8), 0x88888888 - 2**32).int()
    scales = (torch.rand(k // size, n, generator=RANDOM) * 0.01 + 0.001).half()
    tensors = {"qweight": words(k, n // 8), "qzeros": zeros, "scales": scales}
    dequantize = packages.file_of("autoawq", "awq/utils/packing_utils.py").dequantize_gemm
    return tensors, dequantize(tensors["qweight"], zeros, scales.float(), 4, size).T


def settings(group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", **more}


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_gemm(group: int, zero_point: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, group, zero_point), settings(group))
    quantised.read_equals(
        written, caplog, "awq", lambda shape: Grouping(4, shape[1] if group == -1 else group, offsets=zero_point)
    )


def test_as_auto_awq_said_it_first(tmp_path: Path) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 64, True), None)
    beside = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(beside))
    checkpoint = Checkpoint.open(tmp_path)
    for weight, values in written.expected.items():
        assert torch.equal(checkpoint.read(weight, torch.float32), values.float())
    (tmp_path / "quant_config.json").write_text(json.dumps({**beside, "version": "GEMV"}))
    quantised.refused(tmp_path, "quant_config.json", "version 'gemv' is not read; read are 'gemm'")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qzeros": None}, ["qweight", "qzeros is missing beside it"]),
        ({"scales": None}, ["qweight", "scales is missing beside it"]),
        ({"qweight": torch.zeros(16, 256, dtype=torch.int32)}, ["qweight", "[16, 256], config.json implies [128, 32]"]),
        ({"qweight": torch.zeros(128, 32)}, ["qweight", "dtype F32, supported: I32"]),
        ({"scales": torch.ones(2, 128)}, ["scales", "shape [2, 128]", "implies [2, 256]"]),
        ({"qzeros": torch.zeros(4, 32, dtype=torch.int32)}, ["qzeros", "shape [4, 32]", "implies [2, 32]"]),
        (
            {"scales": torch.ones(4, 256), "qzeros": torch.zeros(4, 32, dtype=torch.int32)},
            ["qweight", "4 groups of 64 for 128 inputs"],
        ),
    ],
    ids=str,
)
def test_damage(tmp_path: Path, change: dict[str, torch.Tensor | None], named: list[str]) -> None:
    written = quantised.write(tmp_path, lambda values: theirs(values, 64, True), settings(64))
    quantised.refused(written.change(**change), *named)
