"""Families whose experts differ from Mixtral's, trunk and experts by Triton: the logits of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import AdaptedModel
from backends import open_backend
from random_families import save_random_family, save_random_gpt_oss

from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.expert_reader import ExpertReader

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: these compute on a CPU")
TEXT = [(0, [3, 17, 90, 4, 4, 61, 25, 8])]
TRITON = Backend("float32", trunk="triton", experts="triton")


@pytest.mark.parametrize(
    "family",
    [
        "gpt_oss",  # biases, clamped
        "qwen2_moe",  # an expert that all tokens go to
        "deepseek_v2",  # and layers without experts
        "qwen2_moe, layers without experts",
    ],
)
def test_logits(family: str, tmp_path: Path) -> None:
    save_random_family(tmp_path, family)
    got, expected = (AdaptedModel(tmp_path, Compute(each)).logits(TEXT)[0] for each in (TRITON, Backend("float32")))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mxfp4_is_held_as_it_is_stored(tmp_path: Path) -> None:
    floats, stored = tmp_path / "floats", tmp_path / "mxfp4"
    floats.mkdir()
    stored.mkdir()
    save_random_gpt_oss(floats, stored)
    reader = ExpertReader(Checkpoint.open(stored), {(0, 1)}, open_backend("triton float32"))
    assert reader.layout.format == "int4 by table in groups of 32"
    ffn = reader.read((0, 1))
    wanted = ExpertReader(Checkpoint.open(floats), {(0, 1)}, Compute(Backend("float32"))).read((0, 1))
    rows = torch.randn(4, Checkpoint.open(floats).config.hidden_size, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 0.5, 0.25, 2.0])
    torch.testing.assert_close(ffn.forward(rows, weights), wanted.forward(rows, weights), rtol=1e-4, atol=1e-4)
