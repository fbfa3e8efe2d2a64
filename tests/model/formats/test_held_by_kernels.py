"""Kernels hold quantised checkpoints in their own bits where they can, say where not, and compute right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import test_read_bitsandbytes
import test_read_compressed_tensors
import test_read_whole_models
import torch
from backends import open_backend

from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.weights import weights_of_expert

KEY = (1, 2)


@pytest.mark.parametrize(
    ("quantise", "settings", "quantize", "held"),
    [
        (
            test_read_whole_models.int4,
            test_read_compressed_tensors.settings(test_read_whole_models.GROUPS, "pack-quantized"),
            None,
            "int4 in groups of 32 with offsets",
        ),
        (test_read_whole_models.nf4, test_read_bitsandbytes.FOUR, None, "int4 by table in groups of 64"),
        (test_read_whole_models.nf4, test_read_bitsandbytes.FOUR, "int8", "int4 by table in groups of 64"),
        (
            test_read_whole_models.fp8,
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            None,
            {"native": "float32 (converted from fp8)", "triton": "fp8 e4m3 in groups of 64"},
        ),
        (
            test_read_whole_models.fp8,
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            "int8",
            {"native": "int8 in groups of 128", "triton": "fp8 e4m3 in groups of 64"},
        ),
    ],
)
@pytest.mark.parametrize("backend", ["native float32", "triton float32"])
def test_an_expert(
    backend: str,
    quantise: Callable[[torch.Tensor], quantised.Made],
    settings: dict[str, Any],
    quantize: str | None,
    held: str | dict[str, str],
    tmp_path: Path,
) -> None:
    written = quantised.write(tmp_path, quantise, settings)
    checkpoint = Checkpoint.open(tmp_path)
    reader = ExpertReader(checkpoint, [KEY], open_backend(backend), quantize=quantize)
    if isinstance(held, dict):
        held = held[backend.split()[0]]
    assert reader.layout.format == held
    ffn = reader.read(KEY)
    gate, up, down = (written.expected[weight].double() for weight in weights_of_expert(checkpoint.config, *KEY))
    x = torch.randn(5, gate.shape[1], generator=torch.Generator().manual_seed(3))
    exact = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    error = (ffn.forward(x, torch.ones(5)).double() - exact).abs().max() / exact.abs().max()
    if "float32" in held or "fp8" in held:
        allowed = 1e-5
    else:  # Triton's products are of float32 rows and codes: what is rounded is the scales, to 11 bits
        allowed = 1e-3 if backend.startswith("triton") and reader.held(KEY).startswith("int4") else 3e-2
    assert error < allowed
