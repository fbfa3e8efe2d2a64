"""Plans of checkpoints that are quantised: on a CPU, on cards, and where fewer bits are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised
import torch
from fp8_weights import theirs

from moe_ray.commands.planned import planned
from moe_ray.config import load_config
from moe_ray.experts.planning.model_cost import ModelCost

EXPERT = 2 * 3 * 128 * 256
"""Parameters of an expert, over both layers."""


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a scale for each 64 inputs of 64 rows."""
    directory = tmp_path_factory.mktemp("fp8")
    quantised.write(
        directory,
        lambda values: theirs(values, (64, 64), "weight_scale_inv", torch.float32),
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    )
    return directory


@pytest.mark.parametrize(
    ("kernels", "cards", "quantize", "held", "bits"),
    [
        ("auto", True, None, "fp8", 8 + 32 / 64),
        ("auto", True, "int8", "fp8", 8 + 32 / 64),
        ("auto", True, "int4", "int4", 4 + 16 / 32),
        ("torch", True, None, "bfloat16", 16),
        ("triton", False, None, "fp8", 8 + 32 / 64),
        ("auto", False, None, "bfloat16", 16),
        ("auto", False, "int8", "int8", 8 + 16 / 128),
    ],
)
def test_fp8(fp8: Path, kernels: str, cards: bool, quantize: str | None, held: str, bits: float) -> None:
    model = {"path": str(fp8), "dtype": "bfloat16", "kernels": kernels}
    made = planned(load_config({"model": model, "experts": {"quantize": quantize}}), fp8, cards=cards)
    actor = made.plan.actors[1]
    assert actor.held_as == (held,)
    assert actor.weight_bytes * 8 == EXPERT * bits
    cost = ModelCost.of(made.model, "bfloat16", made.held)
    assert cost.expert.form == ("int8" if held == "fp8" else held)
