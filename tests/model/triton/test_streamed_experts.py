"""Experts by Triton whose layers are in the host's memory: the bits of those in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import SHAPE
from random_mixtral import save_random_mixtral

from moe_ray.experts.server.expert_memory import ExpertMemory
from moe_ray.experts.server.offload import Offload
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.streamed import Movable, StreamedFFN
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.expert_reader import ExpertReader

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: these compute on a CPU")
LAYERS = 4
KEYS = [(layer, 1) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {**SHAPE, "num_hidden_layers": LAYERS}
    return save_random_mixtral(tmp_path_factory.mktemp("model"), seed=1, initializer_range=0.15, **shape)


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_layers_go_through_buffers_whatever_they_are_held_as(model: Path, quantize: str | None) -> None:
    compute = Compute(Backend("float32", experts="triton"))
    reader = ExpertReader(Checkpoint.open(model), KEYS, compute, quantize=quantize)
    plain = {key: reader.read(key) for key in KEYS}
    memory = ExpertMemory(offload_bytes=3 * plain[KEYS[0]].nbytes)
    offload = Offload("Expert1", KEYS, memory, compute)
    settled = {key: offload.settle(key, reader.read(key)) for key in KEYS}
    assert [isinstance(ffn, StreamedFFN) for ffn in settled.values()] == [True, True, False, True]
    assert isinstance(settled[KEYS[2]], Movable)
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(3, SHAPE["hidden_size"], generator=generator), torch.rand(3, generator=generator)
    for key in [*KEYS, *KEYS, KEYS[1], KEYS[0]]:
        assert torch.equal(settled[key].forward(rows, weights), plain[key].forward(rows, weights)), key
        assert list(map(bytes, settled[key].buffers())) == list(map(bytes, plain[key].buffers()))
    offload.close()
