"""Calls of experts that are recorded and replayed: the bits are those of calls that are launched as they come."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from backends import random

from moe_ray.core import AdapterRows, ExpertCall
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.compute import Compute, has_cuda
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.device_calls import AFTER, MOST_ROWS, DeviceCalls
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.recorders import CallRecorder, CudaRecorder, Recording, Tensors
from moe_ray.model.expert import ExpertFFN
from moe_ray.model.lora.parts import ExpertPart

HIDDEN, INNER = 32, 48


class Counting(CallRecorder):
    """Counts what it records."""

    count = 0

    def record(self, run: Callable[[], Tensors]) -> Recording:
        self.count += 1
        return super().record(run)


def network(seed: int = 0) -> TorchFFN:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return TorchFFN(*(random(*shape, scale=0.2, seed=seed + i).float() for i, shape in enumerate(shapes)), "silu")


def call(count: int, seed: int) -> Tensors:
    return random(count, HIDDEN, seed=seed).float(), random(count, seed=seed + 1).float().abs()


def calls_of(recorder: CallRecorder | None) -> DeviceCalls:
    return DeviceCalls(Compute(Backend("float32"), recorder=recorder), HIDDEN)


def test_replays_have_every_bit() -> None:
    recorder, ffns = Counting(), [network(7), network(70)]
    recorded = calls_of(recorder)
    for turn in range(4 * AFTER):
        for count in (1, 3, 4, 16, MOST_ROWS, MOST_ROWS + 1):
            for ffn in ffns:
                rows, weights = call(count, 10 * turn + count)
                got = recorded.forward(ffn, rows, weights)
                torch.testing.assert_close(got, ffn.forward(rows, weights), rtol=1e-6, atol=1e-6)
                assert got.shape == rows.shape
    assert recorder.count == 2 * len({1, 4, 16, MOST_ROWS}), "3 rows are padded to 4; more than the most are launched"


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_cuda_graphs_have_every_bit() -> None:
    ffn = network(7)
    on_card = TorchFFN.joined(*(each.cuda() for each in ffn.tensors()), "silu")
    compute = Compute(Backend("float32", "cuda"), recorder=CudaRecorder())
    recorded = DeviceCalls(compute, HIDDEN)
    for turn in range(4 * AFTER):
        for count in (1, 4, 16):  # none of them padded: a library may take another way for other counts
            rows, weights = call(count, 10 * turn + count)
            expected = on_card.forward(rows.cuda(), weights.cuda())
            assert torch.equal(recorded.forward(on_card, rows, weights), expected)


def test_a_result_outlives_the_next_call() -> None:
    recorded, ffn = calls_of(CallRecorder()), network()
    for _ in range(AFTER):
        recorded.forward(ffn, *call(2, 1))
    first = recorded.forward(ffn, *call(2, 2))
    before = first.clone()
    recorded.forward(ffn, *call(2, 3))
    assert torch.equal(first, before)


def test_calls_with_adapters_are_launched() -> None:
    recorder, ffn = Counting(), network()
    ffn.add_adapter(5, ExpertPart())
    recorded = calls_of(recorder)
    for turn in range(AFTER + 3):
        recorded.forward(ffn, *call(2, turn), (AdapterRows(5, 2),))
    assert recorder.count == 0


class Refusing(CallRecorder):
    """As a card that cannot."""

    def record(self, run: Callable[[], Tensors]) -> Recording:
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")


def test_what_cannot_be_recorded_is_launched_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorded, ffn = calls_of(Refusing()), network()
    for turn in range(AFTER + 3):
        rows, weights = call(2, turn)
        assert torch.equal(recorded.forward(ffn, rows, weights), ffn.forward(rows, weights))
    (said,) = caplog.messages
    assert said.endswith("(CUDA error: operation not permitted)")


def test_a_network_that_goes_takes_its_recordings_along() -> None:
    recorded, ffn = calls_of(CallRecorder()), network()
    for turn in range(AFTER + 1):
        recorded.forward(ffn, *call(2, turn))
    gone = weakref.ref(ffn)
    del ffn
    gc.collect()
    assert gone() is None


def test_a_worker_records_where_its_process_does() -> None:
    recorder, ffn = Counting(), network()
    plain, worker = (
        ExpertWorker(ExpertFFN({(0, 0): ffn}), HIDDEN, Compute(Backend("float32"), recorder=each))
        for each in (None, recorder)
    )
    for turn in range(AFTER + 2):
        rows, weights = call(3, turn)
        replies = [each.forward(ExpertCall(0, 0, rows, weights, turn)) for each in (plain, worker)]
        torch.testing.assert_close(replies[0].rows, replies[1].rows, rtol=1e-6, atol=1e-6)
    assert recorder.count == 1
