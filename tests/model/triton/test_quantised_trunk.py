"""A trunk by Triton whose matrices are quantised: the tokens of transformers on the values that the codes stand for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from adapted import SHAPE
from backends import random
from random_mixtral import save_random_mixtral
from reference import Reference
from safetensors.torch import load_file, save_file
from stepping import events_of

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.triton import products
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.compute.triton.reading import round_on
from moe_ray.model.compute.triton.tiles import tiled_codes
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats.held import grouping
from moe_ray.model.formats.rounding import round_to_nearest
from moe_ray.model.trunk import Trunk

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: these compute on a CPU")
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("model"), seed=1, initializer_range=0.15, **SHAPE)


def with_rounded(model: Path, directory: Path, quantize: str) -> Path:
    """The same model with the values in its trunk that codes of it stand for."""
    shutil.copytree(model, directory)
    tensors = load_file(model / SINGLE)
    found = [name for name in tensors if any(f"{role}.weight" in name for role in QUANTISED)]
    assert len(found) == 4 * SHAPE["num_hidden_layers"] + 1
    for name in found:
        how = grouping(quantize, tensors[name].shape[1])
        assert how is not None
        tensors[name] = torch.from_numpy(round_to_nearest(tensors[name], how, search=how.levels is None).values())
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_tokens(model: Path, tmp_path: Path, quantize: str) -> None:
    checkpoint = Checkpoint.open(model)
    compute = Compute(Backend("float32", trunk="triton", experts="torch"))
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64, quantize=quantize)
    assert all(held.startswith("int") for held in trunk.held)
    engine = Engine(trunk, EngineOptions(16, 8, max_model_len=64))
    prompt = (1, 5, 9, 2, 11)
    request = Request("a", prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    tokens = [token for event in events_of(engine, [request])["a"] for token in event.token_ids]
    assert tokens == Reference(with_rounded(model, tmp_path / "rounded", quantize)).greedy(prompt, 6)


def test_rows_are_the_same_alone_and_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    how = grouping("int4", 160)
    assert how is not None
    weight = tiled_codes([round_on(random(96, 160), how)], how, torch.bfloat16)
    x, bias = random(40, 160), random(96)
    whole = products.linear(weight, x, bias)
    assert torch.equal(products.linear(weight, x[7:8], bias), whole[7:8])
    monkeypatch.setattr(products, "MOST_ROWS", 16)
    assert torch.equal(products.linear(weight, x, bias), whole)
