"""Trunks of two models on the same replicas: each gets what its own experts compute, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from adapted import WAYS, save_adapter
from backends import open_backend, random
from served import eventually
from variant_models import save_variant

from moe_ray.core import AdapterRows, ExpertCall, ReplicaInfo
from moe_ray.errors import AdapterNotHeld
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.local import local_experts
from moe_ray.experts.planning.placement import holdings, with_variants
from moe_ray.experts.server.load_counters import KeyLoad, by_expert
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.experts.sharing import ExpertNumbers, added_keys, share
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.expert_content import contents_of
from moe_ray.model.expert_reader import ExpertReader
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.moe import Routed, group
from moe_ray.transport.local import LocalLink

LAYERS, EXPERTS, WIDTH = 4, 8, 64
EVERY = frozenset((layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS))


@dataclass
class Shared:
    """The replicas of two models, and the numbers of each model's experts."""

    checkpoints: list[Checkpoint]
    numbers: tuple[ExpertNumbers, ...]
    compute: Compute
    workers: dict[str, ExpertWorker]
    bytes_read: int

    def dispatcher(self, model: int) -> ExpertDispatcher:
        """Of a trunk of one of the models."""
        numbers = self.numbers[model]
        infos = [
            ReplicaInfo(name, "local", 1, worker.keys, WIDTH, self.compute.dtype, {"local": name})
            for name, worker in self.workers.items()
        ]
        table = ReplicaTable(
            lambda: numbers.told(infos), lambda info: LocalLink(info, self.workers[info.replica_id].forward), EVERY
        )
        table.refresh()
        return ExpertDispatcher(table, DispatchOptions(in_process=True, numbers=numbers))


@pytest.fixture(scope="module")
def shared(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Experts 2 and 5 differ, 0 and 1 have changed places in layer 3; four experts an actor."""

    def same(key: tuple[int, int]) -> int | None:
        layer, expert = key
        return None if expert in (2, 5) else 1 - expert if layer == 3 and expert < 2 else expert

    tuned = save_variant(random_model, tmp_path_factory.mktemp("variants") / "tuned", same)
    checkpoints, compute = [Checkpoint.open(random_model), Checkpoint.open(tuned)], open_backend("torch float32")
    numbers, workers, read = share(contents_of(checkpoints)), {}, 0
    for one in with_variants(holdings(LAYERS, EXPERTS, 4), added_keys(numbers, EXPERTS), EXPERTS):
        reader = ExpertReader(checkpoints[0], one.all_keys, compute, variants=checkpoints[1:])
        ffn = ExpertFFN({key: reader.read(key) for key in reader.keys})
        workers[one.name] = ExpertWorker(ffn, WIDTH, compute)
        read = reader.bytes_read
    return Shared(checkpoints, numbers, compute, workers, read)


def rows_of(layer: int, tokens: int = 24) -> Routed:
    """Token rows whose experts take turns: each has some."""
    chosen = torch.tensor([[(t + layer) % 8, (t + 3) % 8] for t in range(tokens)]).sort(-1).values
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(layer))
    return group(random(tokens, WIDTH, seed=layer).float(), chosen, weights, EXPERTS)


def test_each_trunk_gets_its_own_models_rows(shared: Shared) -> None:
    told = {}
    for model in (0, 1):
        alone, dispatcher = local_experts(shared.checkpoints[model], shared.compute), shared.dispatcher(model)
        assert dispatcher.missing() == []
        told[model] = []
        for layer in range(LAYERS):
            got = dispatcher.submit(layer, rows_of(layer)).gather().rows
            assert torch.equal(got, alone.submit(layer, rows_of(layer)).gather().rows)
            told[model].append(got)
    assert not any(torch.equal(*both) for both in zip(*told.values(), strict=True))


def test_rows_of_two_models_that_wait_are_computed_in_one_batch(shared: Shared) -> None:
    """The first model's expert 1 of layer 3 is the second one's expert 0. A third call holds the device meanwhile."""
    worker, numbers = shared.workers["Experts0-3"], shared.numbers
    assert numbers[0].of(3, 1) == numbers[1].of(3, 0) == 1
    calls = [ExpertCall(3, 1, random(n, WIDTH, seed=n).float(), torch.ones(n)) for n in (5, 3, 2)]
    alone = [worker.forward(call).rows for call in calls]
    before = worker.stats()
    with ThreadPoolExecutor(3) as threads, worker._device.turn:
        replies, queued = [], 0
        for call in calls:
            replies.append(threads.submit(worker.forward, call))
            queued += call.rows.shape[0]
            eventually(partial(lambda rows: worker.stats().queued_rows == rows, queued))
    for reply, expected in zip(replies, alone, strict=True):
        torch.testing.assert_close(reply.result().rows, expected)  # bits are equal with native kernels: tests/system
    after = worker.stats()
    assert (after.calls - before.calls, after.batches - before.batches) == (3, 2)


def test_what_is_equal_was_read_once(shared: Shared) -> None:
    one = 3 * WIDTH * 112 * 4
    assert shared.bytes_read == LAYERS * (8 + 2) * one
    assert [len(worker.keys) for worker in shared.workers.values()] == [LAYERS * 5, LAYERS * 5]


def test_an_expert_that_is_away_is_missing_by_each_models_own_number(shared: Shared) -> None:
    """In layer 3 expert 0 of the second model is what the first calls 1; expert 2 is its own."""
    info = ReplicaInfo("all but two", "local", 1, frozenset(), WIDTH, "float32", {})
    keys = frozenset().union(*(worker.keys for worker in shared.workers.values())) - {(3, 1), (0, 10)}
    missing = []
    for numbers in shared.numbers:
        own = numbers.told([replace(info, keys=keys)])[0].keys
        missing.append(sorted(EVERY - own))
    assert missing == [[(3, 1)], [(0, 2), (3, 0)]]


def test_an_adapter_is_held_for_its_own_models_experts_alone(
    shared: Shared, random_model: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(
        save_adapter(random_model, tmp_path / "adapter", 3, **WAYS["one matrix of the experts"]),
        shared.checkpoints[0].config,
    )
    worker = shared.workers["Experts0-3"]
    worker.add_adapter(adapter)
    rows, weights, runs = random(2, WIDTH).float(), torch.ones(2), (AdapterRows(adapter.adapter_id, 2),)
    plain = worker.forward(ExpertCall(1, 2, rows, weights)).rows
    assert not torch.equal(worker.forward(ExpertCall(1, 2, rows, weights, adapters=runs)).rows, plain)
    with pytest.raises(AdapterNotHeld):
        worker.forward(ExpertCall(1, EXPERTS + 2, rows, weights, adapters=runs))
    worker.remove_adapter(adapter.adapter_id)


def test_load_counts_where_an_expert_is_held() -> None:
    loads = {(0, 1): KeyLoad(2, 20, 1.0, 0.5), (0, 9): KeyLoad(1, 5, 0.25, 0.0), (1, 17): KeyLoad(1, 1, 0.1, 0.0)}
    assert by_expert(loads, 8) == {(0, 1): KeyLoad(3, 25, 1.25, 0.5), (1, 1): KeyLoad(1, 1, 0.1, 0.0)}
