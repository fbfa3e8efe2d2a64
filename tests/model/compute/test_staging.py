"""Rows through pinned memory: waited for where they must be, and no buffer is used again while a copy uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import random
from delayed_transfers import DelayedTransfers
from random_mixtral import SMALL, save_random_mixtral
from spread import Placement, Spread
from stepping import events_of

from moe_ray.core import ExpertCall, Request, SamplingParams
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model import moe
from moe_ray.model.compute import compute as compute_file
from moe_ray.model.compute.compute import Compute, has_cuda
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.device_calls import AFTER, DeviceCalls
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.recorders import CallRecorder, Recorder
from moe_ray.model.compute.torch.staging import MOST_FREE_BYTES, CudaTransfers, Staging
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.families import Router

HIDDEN, INNER, EXPERTS = 32, 48, 4


def routed(tokens: int, seed: int, staging: Staging | None) -> moe.Routed:
    hidden = random(tokens, HIDDEN, seed=seed).float()
    chosen, weights = moe.route(hidden, random(EXPERTS, HIDDEN, seed=1).float(), 2, Router(renormalise=True))
    made = moe.group(hidden, chosen, weights, EXPERTS)
    made.staging = staging
    return made


def test_what_was_fetched_is_there() -> None:
    device = DelayedTransfers()
    plain, staged = routed(7, 3, None), routed(7, 3, device.staging())
    there = staged.on_host()
    assert there is not staged
    assert there is staged.on_host()
    assert there is there.on_host()
    assert there.counts == plain.counts
    for name in ("rows", "weights", "row_of"):
        assert torch.equal(getattr(there, name), getattr(plain, name)), name
    assert device.waits == 1, "everything at once"


def layer_of(seed: int, staging: Staging) -> tuple[torch.Tensor, torch.Tensor]:
    """What came back of rows that were doubled elsewhere, on its way to the device, and what it should be."""
    here = routed(5, seed, staging)
    received = here.on_host().reply_rows()
    assert received is not None
    received.copy_(here.on_host().rows * 2)
    return here.brought(received), here.rows * 2


def test_layers_take_turns_with_their_buffers() -> None:
    """As a trunk does: what a layer has received is still on its way to the device while the next one routes."""
    device = DelayedTransfers()
    staging = device.staging()
    made = [layer_of(layer, staging) for layer in range(6)]
    device.wait(device.mark())
    assert all(torch.equal(got, wanted) for got, wanted in made)
    assert device.buffers < 3 * 6, "they are used again"


def test_replies_come_into_any_memory_where_nothing_is_copied() -> None:
    plain = routed(5, 1, None)
    assert plain.on_host() is plain
    assert plain.reply_rows() is None
    rows = torch.randn_like(plain.rows)
    assert torch.equal(plain.brought(rows), rows)
    into = torch.empty_like(rows)
    assert plain.brought(rows, into) is into
    assert torch.equal(into, rows)


class Hasty(Staging):
    """Uses a buffer again at once."""

    def give(self, buffer: torch.Tensor, after: Any = None) -> None:
        super().give(buffer)


def test_a_buffer_used_too_early_is_noticed_by_that_device() -> None:
    device = DelayedTransfers()
    staging = Hasty(device)
    with pytest.raises(AssertionError, match="before the copy"):
        [layer_of(layer, staging) for layer in range(3)]


class Careless(DelayedTransfers):
    """Whose copies are not waited for."""

    def wait(self, mark: int) -> None:
        pass


def test_a_missing_wait_is_noticed_by_that_device() -> None:
    assert bool(routed(5, 1, Careless().staging()).on_host().rows.isnan().all())


def test_buffers_that_wait_are_bounded() -> None:
    device = DelayedTransfers()
    staging = device.staging()
    for buffer in [staging.take(MOST_FREE_BYTES // 2) for _ in range(3)]:
        staging.give(buffer)
    kept = [staging.take(MOST_FREE_BYTES // 2) for _ in range(2)]
    assert device.buffers == 3
    assert len(kept[0]) == MOST_FREE_BYTES // 2
    staging.take(MOST_FREE_BYTES // 2)
    assert device.buffers == 4, "the third was given back to the system"


# ---- calls of experts


def network(seed: int = 7) -> TorchFFN:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return TorchFFN(*(random(*shape, scale=0.2, seed=seed + i).float() for i, shape in enumerate(shapes)), "silu")


@pytest.mark.parametrize("recorder", [None, CallRecorder()], ids=["launched", "recorded"])
def test_a_call_is_copied_in_copied_out_and_waited_for_once(recorder: Recorder | None) -> None:
    device, ffn = DelayedTransfers(), network()
    calls = DeviceCalls(Compute(Backend("float32"), recorder=recorder, staging=device.staging()), HIDDEN)
    for turn, count in enumerate([1, 3, 4, 3] * (AFTER + 2)):
        rows, weights = random(count, HIDDEN, seed=turn).float(), random(count, seed=turn + 1).float().abs()
        before, out = (device.waits, device.copies), torch.empty_like(rows)
        if turn % 2:
            calls.fill(ffn, rows, weights, (), out)
        else:
            out = calls.forward(ffn, rows, weights)
        assert (device.waits - before[0], device.copies - before[1]) == (1, 2)
        torch.testing.assert_close(out, ffn.forward(rows, weights), rtol=1e-6, atol=1e-6)
    assert device.buffers <= 4, "two a size"


def test_a_worker_computes_through_it() -> None:
    ffn = network()
    compute = Compute(Backend("float32"), staging=DelayedTransfers().staging())
    worker = ExpertWorker(ExpertFFN({(0, 0): ffn}), HIDDEN, compute)
    replies = []
    for turn in range(3):
        rows, weights = random(5, HIDDEN, seed=turn).float(), random(5, seed=turn).float().abs()
        reply = worker.forward(ExpertCall(0, 0, rows, weights, turn))
        replies.append((reply.rows, ffn.forward(rows, weights)))
    assert all(torch.equal(got, wanted) for got, wanted in replies), "each outlives the next call"


# ---- whole engines

PROMPTS = [[5, 7, 11], [(3 + 5 * i) % 90 + 3 for i in range(30)], [(1 + 7 * i) % 90 + 3 for i in range(13)]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("staged") / "model", seed=3, **SMALL)


def answers(directory: Path, placement: Placement, micro_batches: int) -> dict[str, list[int]]:
    settings = {
        "model": {"dtype": "float32", "device": "cpu", "kernels": "torch"},
        "engine": {"kv_cache_tokens": 512, "micro_batches": micro_batches, "max_num_batched_tokens": 16},
    }
    spread = Spread(directory, settings, placement)
    try:
        sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        requests = [Request(f"p{i}", tuple(prompt), sampling) for i, prompt in enumerate(PROMPTS)]
        return {
            name: [token for event in events for token in event.token_ids]
            for name, events in events_of(spread.engine, requests).items()
        }
    finally:
        spread.close()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DelayedTransfers]]:
    """Every process that computes has such a device from now on."""
    made: list[DelayedTransfers] = []

    def staging(backend: Backend) -> Staging:
        made.append(DelayedTransfers())
        return made[-1].staging()

    monkeypatch.setattr(compute_file, "_staging", staging)
    yield made
    for device in made:
        device.wait(device.mark())


@pytest.mark.parametrize(("carrier", "native"), [("socket", True), ("socket", False), ("grpc", False)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_engines_over_carriers_have_the_tokens_of_one_process(
    model: Path, devices: list[DelayedTransfers], carrier: str, native: bool, micro_batches: int
) -> None:
    homes = ((0, 1), (1,), (2, 0))
    got = answers(model, Placement(carrier, homes, native), micro_batches)
    assert len(devices) == 4, "a trunk's and three replicas'"
    assert all(device.copies for device in devices)
    assert devices[0].buffers < 30, "buffers are used again"
    assert got == answers(model, Placement(), 1)


# ---- on a card


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_on_a_card_rows_come_and_go() -> None:
    device = torch.device("cuda")
    staging = Staging(CudaTransfers(device))
    assert staging.take(100).is_pinned()
    for layer in range(50):
        plain = routed(33, layer, None)
        here = moe.Routed(*(each.to(device) for each in plain.tensors()))
        here.staging = staging
        there = here.on_host()
        assert torch.equal(there.rows, plain.rows)
        received = there.reply_rows()
        assert received is not None
        assert received.is_pinned()
        received.copy_(there.rows * 2)
        assert torch.equal(here.brought(received).cpu(), plain.rows * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_on_a_card_calls_are_staged() -> None:
    ffn = network()
    on_card = TorchFFN.joined(*(each.cuda() for each in ffn.tensors()), "silu")
    staging = Staging(CudaTransfers(torch.device("cuda")))
    calls = DeviceCalls(Compute(Backend("float32", "cuda"), staging=staging), HIDDEN)
    for turn in range(20):
        rows, weights = random(9, HIDDEN, seed=turn).float(), random(9, seed=turn).float().abs()
        wanted = on_card.forward(rows.cuda(), weights.cuda()).cpu()
        assert torch.equal(calls.forward(on_card, rows, weights), wanted)
