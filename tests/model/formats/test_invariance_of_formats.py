"""Checkpoints of every quantised format give the same tokens, bit for bit, under any circumstances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised
import test_read_awq
import test_read_bitsandbytes
import test_read_gptq
import test_read_mxfp4
import test_read_ternary
import test_read_whole_models
import torch
from backends import BEST
from invariance import Promise, requests_of
from random_families import save_random_gpt_oss

EXAMPLES = 3
pytestmark = pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")


def gptq(values: torch.Tensor) -> quantised.Made:
    """With columns in the order of their activations."""
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(values.shape[1]))
    return test_read_gptq.theirs(values, 4, 32, False, order)


def awq(values: torch.Tensor) -> quantised.Made:
    return test_read_awq.theirs(values, 64, True)


def mxfp4(values: torch.Tensor) -> quantised.Made:
    tensors, read = test_read_mxfp4.theirs(values)
    return {f"weight_{suffix}": tensor for suffix, tensor in tensors.items()}, read


STORED: dict[str, tuple[Callable[[torch.Tensor], quantised.Made], dict[str, Any]]] = {
    "gptq": (gptq, test_read_gptq.settings(4, 32, desc_act=True)),
    "awq": (awq, test_read_awq.settings(64)),
    "compressed-tensors": (
        test_read_whole_models.int4,
        test_read_whole_models.test_read_compressed_tensors.settings(test_read_whole_models.GROUPS, "pack-quantized"),
    ),
    "nf4": (test_read_whole_models.nf4, test_read_bitsandbytes.FOUR),
    "bitsandbytes' int8": (test_read_bitsandbytes.eight_bits, test_read_bitsandbytes.EIGHT),
    "fp8": (test_read_whole_models.fp8, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
    "ternary": (test_read_ternary.theirs, test_read_ternary.SETTINGS),
}


@pytest.mark.parametrize("stored", STORED)
def test_a_checkpoint(stored: str, tmp_path: Path) -> None:
    quantise, settings = STORED[stored]
    quantised.write(tmp_path, quantise, settings)
    model = {"model": {"dtype": "bfloat16"}}
    Promise(tmp_path, model, requests_of(quantised.CONFIG["vocab_size"]), stored).keep(EXAMPLES)


def test_gpt_oss_as_it_is_published(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    save_random_gpt_oss(tmp_path_factory.mktemp("floats"), tmp_path)
    Promise(tmp_path, {"model": {"dtype": "bfloat16"}}, requests_of(128), "gpt_oss").keep(EXAMPLES)
