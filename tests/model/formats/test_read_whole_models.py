"""A quantised checkpoint, computed by trunk and experts, is what transformers computes from the reference's floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import test_read_bitsandbytes
import test_read_compressed_tensors
import test_read_fp8
import torch
from reference import Reference
from safetensors.torch import save_file

from moe_ray.config import load_config
from moe_ray.model.families.mixtral import MIXTRAL
from moe_ray.model.foreign import SINGLE
from moe_ray.quality.scorer import Scorer

CONTEXT = 48
GROUPS = test_read_compressed_tensors.arguments(4, False, "group", 32)


def int4(values: torch.Tensor) -> quantised.Made:
    return test_read_compressed_tensors.theirs(values, GROUPS, "pack-quantized", torch.float16)


def nf4(values: torch.Tensor) -> quantised.Made:
    return test_read_bitsandbytes.four_bits(values, "nf4", 64, nested=True)


def fp8(values: torch.Tensor) -> quantised.Made:
    return test_read_fp8.theirs(values, (64, 64), "weight_scale_inv", torch.float32)


@pytest.mark.parametrize(
    ("quantise", "settings"),
    [
        (int4, test_read_compressed_tensors.settings(GROUPS, "pack-quantized")),
        (nf4, test_read_bitsandbytes.FOUR),
        (fp8, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
    ],
)
def test_logits(quantise: Callable[[torch.Tensor], quantised.Made], settings: dict[str, Any], tmp_path: Path) -> None:
    """The model's dtype is float16, as in most quantised repositories."""
    there, floats = tmp_path / "quantised", tmp_path / "floats"
    there.mkdir()
    floats.mkdir()
    written = quantised.write(there, quantise, settings)
    tensors = {
        MIXTRAL.layouts[0].place(weight, 0).named("weight"): values.float().contiguous()
        for weight, values in written.expected.items()
    }
    save_file(tensors, floats / SINGLE, metadata={"format": "pt"})
    (floats / "config.json").write_text(json.dumps(quantised.CONFIG))
    token_ids = torch.randint(3, 64, (CONTEXT,), generator=torch.Generator().manual_seed(8)).tolist()
    theirs = Reference(floats).logits(token_ids)[:-1]
    config = load_config({"model": {"path": str(there), "dtype": "float32", "device": "cpu", "kernels": "torch"}})
    (scored,) = Scorer(config, there, CONTEXT).score(token_ids)
    torch.testing.assert_close(scored.logits, theirs, rtol=1e-4, atol=1e-5)
    for dtype in ("auto", "float16", "bfloat16"):
        config = load_config({"model": {"path": str(there), "dtype": dtype, "device": "cpu"}})
        (rounded,) = Scorer(config, there, CONTEXT).score(token_ids)
        assert (rounded.logits - theirs).abs().max() < 0.1 * theirs.abs().max()
