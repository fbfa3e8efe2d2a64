"""An engine whose steps of decoding are recorded, by what keeps the contract of CUDA graphs on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stepping import events_of

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.plan import padded_count
from moe_ray.model.compute.torch.recorders import CallRecorder
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.trunk import Trunk

torch.set_num_threads(1)


def requests() -> list[Request]:
    """Of many lengths, so that sequences join and leave at every step; half of them sampled."""
    rng = random.Random(3)
    made = []
    for number in range(20):
        params = SamplingParams(max_tokens=rng.randint(6, 26), temperature=number % 2, seed=number, ignore_eos=True)
        prompt = tuple(rng.randrange(3, 500) for _ in range(rng.randint(1, 12)))
        made.append(Request(str(number), prompt, replace(params, logprobs=2 if number % 5 == 0 else None)))
    return made


def tokens_of(directory: Path, recorder: CallRecorder | None, micro_batches: int) -> tuple[dict[str, list[int]], Trunk]:
    checkpoint = Checkpoint.open(directory)
    experts = local_experts(checkpoint, Compute(Backend("float32")))
    trunk = Trunk.load(checkpoint, experts, Compute(Backend("float32"), recorder=recorder), 64)
    options = EngineOptions(200, 4, max_model_len=64, micro_batches=micro_batches)
    engine = Engine(trunk, options)
    made = requests()
    events = events_of(engine, made, [0] * 4 + [2] * (len(made) - 4))
    engine.close()
    return {name: [token for event in own for token in event.token_ids] for name, own in events.items()}, trunk


@pytest.mark.parametrize("micro_batches", [1, 2])
@torch.inference_mode()
def test_sequences_that_come_and_go_have_the_tokens_of_eager_steps(random_model: Path, micro_batches: int) -> None:
    wanted, _ = tokens_of(random_model, None, micro_batches)
    got, trunk = tokens_of(random_model, CallRecorder(), micro_batches)
    assert got == wanted
    assert sum(map(len, got.values())) == sum(request.sampling.max_tokens or 0 for request in requests())
    compute = trunk._compute
    assert isinstance(compute, TorchTrunk)
    assert compute._recordings is not None
    lanes = compute._recordings.lanes
    assert len(lanes) == micro_batches
    for lane in lanes:
        keys = list(lane.kept)
        assert {key[1][0] for key in keys} <= {padded_count(n) for n in range(1, 21)}
        assert 2 <= len(keys) <= 12
