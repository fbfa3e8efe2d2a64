"""An FP8 checkpoint by Triton stays in its own 8 bits, and gives the tokens of transformers on the values of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantised
import torch
from fp8_weights import ROW, TENSOR, Block, theirs
from reference import Reference
from safetensors.torch import save_file
from stepping import events_of

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.experts.local import local_experts
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.families.mixtral import MIXTRAL
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.trunk import Trunk
from moe_ray.model.weights import matrices_of_expert

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: these compute on a CPU")
GROUPS = {(64, 64): {64}, ROW: {128, 256}, TENSOR: {128, 256}}


def saved(directory: Path, block: Block, kind: torch.dtype = torch.float8_e4m3fn) -> quantised.Written:
    settings = {"quant_method": "fp8"} | ({"weight_block_size": list(block)} if block[1] else {})
    directory.mkdir()

    def packed(values: torch.Tensor) -> quantised.Made:
        # Larger than other random weights: so greedy tokens are far from a draw.
        return theirs(values * 3, block, "weight_scale_inv", torch.float32, kind)

    return quantised.write(directory, packed, settings)


@pytest.mark.parametrize("block", [(64, 64), *(pytest.param(each, marks=pytest.mark.slow) for each in (ROW, TENSOR))])
def test_tokens(tmp_path: Path, block: Block) -> None:
    written = saved(tmp_path / "fp8", block)
    floats = tmp_path / "floats"
    floats.mkdir()
    tensors = {
        MIXTRAL.layouts[0].place(weight, 0).named("weight"): values.float().contiguous()
        for weight, values in written.expected.items()
    }
    save_file(tensors, floats / SINGLE, metadata={"format": "pt"})
    (floats / "config.json").write_text(json.dumps(quantised.CONFIG))
    checkpoint = Checkpoint.open(written.directory)
    compute = Compute(Backend("float32", trunk="triton", experts="triton"))
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64)
    assert set(trunk.held) == {"fp8 e4m3 in groups of " + str(min(GROUPS[block])), "float32"}
    engine = Engine(trunk, EngineOptions(16, 8, max_model_len=64))
    prompt = (1, 5, 9, 2, 11)
    request = Request("a", prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    tokens = [token for event in events_of(engine, [request])["a"] for token in event.token_ids]
    assert tokens == Reference(floats).greedy(prompt, 6)
    assert len(set(tokens)) > 1


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", GROUPS)
def test_an_expert_takes_what_is_planned(tmp_path: Path, block: Block, kind: torch.dtype) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path / "fp8", block, kind).directory)
    reader = ExpertReader(checkpoint, [(1, 2)], Compute(Backend("float16", experts="triton")))
    weights = matrices_of_expert(checkpoint.config, 1, 2)
    kept = WeightsHeld.kept({weight: checkpoint.find(weight) for weight in weights}, by_triton=True)
    held = WeightsHeld(HeldAs("float16"), stored=kept)
    assert reader.read((1, 2)).nbytes == sum(map(held.nbytes, weights))
    assert {held.held_as(weight) for weight in weights} == {"fp8"}


def test_groups_that_kernels_have_not_become_floats(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path / "fp8", (16, 16)).directory)
    reader = ExpertReader(checkpoint, [(1, 2)], Compute(Backend("float16", experts="triton")))
    assert reader.held((1, 2)) == "float16 (converted from fp8)"
