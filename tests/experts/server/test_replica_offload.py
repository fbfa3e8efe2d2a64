"""A replica with a budget, and one whose layers are partly in the host's memory: same tokens, refusals with numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from backends import open_backend

from moe_ray.core import ExpertCall, SamplingParams
from moe_ray.errors import ConfigError, OverBudget
from moe_ray.experts import local
from moe_ray.experts.planning.offload import BUFFERS
from moe_ray.experts.server.expert_memory import NO_LIMITS, ExpertMemory
from moe_ray.experts.server.offload import CardBuffers, Offload
from moe_ray.experts.server.weight_loader import WeightLoader
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.card_memory import check_budget, limit_card_memory, share_of
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.streamed import StreamedFFN
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.moe import group
from moe_ray.transport.base import LinkOptions

KEYS = [(layer, 2) for layer in range(4)]
LAYER = 3 * 64 * 112 * 4
TORCH = Compute(Backend("float32"))
SOON_S = 20.0


def load(model: Path, memory: ExpertMemory, compute: Compute = TORCH) -> WeightLoader:
    loader = WeightLoader("Expert2", ExpertReader(Checkpoint.open(model), KEYS, compute), 64, compute, None, memory)
    loader.start(lambda: (), "r", "n", LinkOptions())
    assert loader.wait(SOON_S)
    return loader


def answers(loader: WeightLoader) -> Sequence[torch.Tensor]:
    rows, weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.full((3,), 0.5)
    return [loader.worker.forward(ExpertCall(layer, 2, rows, weights, 1)).rows for layer in (0, 1, 2, 3, 2, 0)]


def test_an_offloaded_replica_answers_as_another(random_model: Path) -> None:
    plain, offloaded = load(random_model, NO_LIMITS), load(random_model, ExpertMemory(offload_bytes=3 * LAYER))
    assert offloaded.failure is None
    assert all(map(torch.equal, answers(plain), answers(offloaded)))
    assert offloaded.worker.stats().weight_bytes == 4 * LAYER
    streamed = [key for key in KEYS if isinstance(offloaded.worker._ffn[key], StreamedFFN)]
    assert streamed == [(0, 2), (1, 2), (3, 2)]
    for key in KEYS:  # what another replica takes
        assert list(map(bytes, plain.worker.buffers(key))) == list(map(bytes, offloaded.worker.buffers(key)))
    for loader in (plain, offloaded):
        loader.close()


def test_the_hottest_layers_stay(random_model: Path) -> None:
    rows = tuple(tuple(float(load) for _ in range(8)) for load in (9, 1, 2, 3))
    loader = load(random_model, ExpertMemory(offload_bytes=3 * LAYER, rows=rows))
    assert not isinstance(loader.worker._ffn[0, 2], StreamedFFN)
    assert all(isinstance(loader.worker._ffn[layer, 2], StreamedFFN) for layer in (1, 2, 3))
    loader.close()


def test_a_budget_counts_what_is_on_the_card(random_model: Path) -> None:
    load(random_model, ExpertMemory(budget_bytes=4 * LAYER)).close()
    with pytest.raises(
        OverBudget, match=r"Expert2, 4 layers on the card: needs \S+ GiB, its budget \(gpu_memory_gib\)"
    ):
        load(random_model, ExpertMemory(budget_bytes=4 * LAYER - 1))
    # One layer and two buffers are on the card.
    load(random_model, ExpertMemory(3 * LAYER, 3 * LAYER)).close()
    with pytest.raises(OverBudget, match="Expert2, 3 layers on the card"):
        load(random_model, ExpertMemory(3 * LAYER - 1, 3 * LAYER))


def test_a_layer_larger_than_the_first_is_counted(random_model: Path) -> None:
    reader = ExpertReader(Checkpoint.open(random_model), KEYS, TORCH)
    offload = Offload("Expert2", KEYS, ExpertMemory(budget_bytes=4 * LAYER), TORCH)
    first = reader.read(KEYS[0])
    offload.settle(KEYS[0], first)
    first.nbytes = 4 * LAYER
    with pytest.raises(OverBudget, match="Expert2: needs"):
        offload.settle(KEYS[1], first)
    assert offload.card_bytes == LAYER


def test_native_kernels_compute_on_weights_where_they_are(random_model: Path) -> None:
    compute = open_backend("native float32")
    with pytest.raises(
        ConfigError, match=r"native kernels compute the experts of this process on cpu.*allowed there: 0"
    ):
        load(random_model, ExpertMemory(offload_bytes=3 * LAYER), compute)


def test_a_budget_is_a_share_of_a_card() -> None:
    assert share_of(4, 16) == 0.25
    assert share_of(32, 16) == 1
    limit_card_memory(1, "cpu")  # there is no card to limit
    check_budget("Trunk", 5, None)
    check_budget("Trunk", 5, 5)
    with pytest.raises(OverBudget):
        check_budget("Trunk", 6, 5)


def test_greedy_tokens_with_an_offload(readable_model: Path) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = [[5, 6, 7, 8], list(range(20, 60)), [300]]

    def tokens(offload_gib: float) -> list[list[int]]:
        llm = LLM(
            readable_model,
            dtype="float32",
            kernels="torch",
            engine={"kv_cache_gib": 0.02},
            experts={"cpu_offload_gib": offload_gib},
        )
        return [output.token_ids for output in llm.generate(prompts, sampling)]

    assert tokens(2.5 * LAYER / 2**30) == tokens(LAYER / 2**30) == tokens(0)


def test_experts_of_one_process_share_two_buffers(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps one layer of four in the host's memory: for buffers of its own that would be too few."""
    found: list[CardBuffers] = []

    class Noted(CardBuffers):
        def __init__(self, compute: Compute, sharers: int) -> None:
            super().__init__(compute, sharers)
            found.append(self)

    monkeypatch.setattr(local, "CardBuffers", Noted)
    checkpoint = Checkpoint.open(random_model)
    pools = [local.local_experts(checkpoint, TORCH, offload_bytes=lambda _, n=n: n) for n in (0, LAYER)]
    assert found[1].streams.buffer_bytes == BUFFERS * LAYER
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 3, 1, 40):
        for layer in (*range(4), 2):
            x = torch.randn(tokens, 64, generator=generator)
            chosen = torch.stack([torch.randperm(8, generator=generator)[:2].sort().values for _ in range(tokens)])
            routed = group(x, chosen, torch.full((tokens, 2), 0.5), 8)
            plain, shared = (pool.gather(pool.submit(layer, routed)).rows for pool in pools)
            assert torch.equal(plain, shared)
