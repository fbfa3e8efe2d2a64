"""Layers that are copied to where they are computed: the bits of layers that are there, in whatever order of calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.core import AdapterRows
from moe_ray.errors import EngineError
from moe_ray.model.compute.torch.copy_engine import CudaCopies, ThreadCopies, copies_to
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.streamed import LayerStream, LayerStreams, Movable, StreamedFFN
from moe_ray.model.lora.parts import ExpertPart, LowRank

WIDTH, INNER, SOON_S = 16, 24, 20.0
ORDER = [(1, 0), (3, 0), (4, 0), (6, 0)]


def network(seed: int, inner: int = INNER, biases: bool = False) -> TorchFFN:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(inner, WIDTH), (inner, WIDTH), (WIDTH, inner), *([(inner,), (inner,), (WIDTH,)] if biases else [])]
    w1, w3, w2, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return TorchFFN(w1, w3, w2, "silu", rest)


ROWS, WEIGHTS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(99)), torch.rand(3)


class Streamed:
    """Four layers that go through two buffers."""

    def __init__(self, engine: ThreadCopies, biases: bool = False) -> None:
        self.plain = {key: network(key[0], biases=biases) for key in ORDER}
        self.stream = LayerStream(engine, network(0, biases=biases).tensors())
        self.ffns = {key: StreamedFFN(key, network(key[0], biases=biases), self.stream) for key in ORDER}

    def check(self, key: tuple[int, int]) -> None:
        assert torch.equal(self.ffns[key].forward(ROWS, WEIGHTS), self.plain[key].forward(ROWS, WEIGHTS)), key


@pytest.fixture
def streamed() -> Iterator[Streamed]:
    made = Streamed(ThreadCopies())
    yield made
    made.stream.close()


@given(st.lists(st.sampled_from(ORDER), max_size=20), st.booleans())
def test_any_order_of_calls_gives_the_bits_of_layers_in_place(calls: list[tuple[int, int]], biases: bool) -> None:
    made = Streamed(ThreadCopies(), biases)
    for key in calls:
        made.check(key)
    made.stream.close()
    assert made.stream.calls == len(calls)


def test_layers_in_their_order_are_copied_once_each(streamed: Streamed) -> None:
    for key in [*ORDER, *ORDER, *ORDER]:
        streamed.check(key)
    assert streamed.stream.copies == 3 * len(ORDER) + 1, "and the one that comes next"
    streamed.check(ORDER[2])  # not the one that was expected; the one after it is there still
    assert streamed.stream.copies == 3 * len(ORDER) + 2
    streamed.check(ORDER[2])
    assert streamed.stream.copies == 3 * len(ORDER) + 2


def test_the_next_layer_is_copied_while_one_is_computed(streamed: Streamed) -> None:
    following = streamed.plain[ORDER[1]].tensors()
    seen: list[bool] = []

    def compute(buffer: int) -> torch.Tensor:
        other = streamed.stream.buffers[1 - buffer]
        streamed.stream._buffers[1 - buffer].copied.result(SOON_S)
        seen.append(all(map(torch.equal, other, following)))
        return ROWS

    streamed.stream.run(ORDER[0], compute)
    assert seen == [True]


class Late(ThreadCopies):
    """Products that end when they are let, as those of a card do after the call has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Future[None]] = []
        self.late = False

    def mark(self) -> Future[None]:
        if not self.late:
            return super().mark()
        self.running.append(Future())
        return self.running[-1]


def test_a_buffer_that_is_still_read_is_not_copied_over() -> None:
    engine = Late()
    made = Streamed(engine)
    engine.late = True
    first, second, third, _ = ORDER
    made.check(first)
    made.check(second)  # and the third is to be copied to where the first is
    (holding,) = [
        number
        for number, buffer in enumerate(made.stream.buffers)
        if all(map(torch.equal, buffer, made.plain[first].tensors()))
    ]
    copying = made.stream._buffers[holding].copied
    assert made.stream._buffers[holding].key == third
    assert not copying.done()
    engine.running[1].set_result(None)  # the second layer's product: not the one that counts
    assert all(map(torch.equal, made.stream.buffers[holding], made.plain[first].tensors()))
    assert not copying.done()
    engine.running[0].set_result(None)
    copying.result(SOON_S)
    made.check(third)
    for mark in engine.running[2:]:
        mark.set_result(None)
    made.stream.close()


class Gated(ThreadCopies):
    """Copies that wait until they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.let, self.begun = threading.Event(), threading.Event()
        self.fault: Exception | None = None

    def _copy(self, source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], after: Future[None]) -> None:
        self.begun.set()
        assert self.let.wait(SOON_S)
        if self.fault is not None:
            raise self.fault
        super()._copy(source, target, after)


THREADS = ThreadPoolExecutor(40)
in_thread = THREADS.submit


def test_closing_waits_for_the_copy_under_way_and_begins_no_other() -> None:
    engine = Gated()
    made = Streamed(engine)
    engine.let.set()
    made.check(ORDER[0])
    made.stream._buffers[1].copied.result(SOON_S)
    engine.let.clear()
    engine.begun.clear()
    calling = in_thread(partial(made.check, ORDER[1]))  # it is there, and the next is copied
    assert engine.begun.wait(SOON_S)
    calling.result(SOON_S)
    closing = in_thread(made.stream.close)
    with pytest.raises(TimeoutError):
        closing.result(0.1)
    engine.let.set()
    closing.result(SOON_S)
    with pytest.raises(EngineError, match="this replica is ending"):
        made.check(ORDER[2])
    made.stream.close()


def test_a_copy_that_fails_fails_the_call_that_needs_it() -> None:
    engine = Gated()
    made = Streamed(engine)
    engine.fault = RuntimeError("the link is down")
    engine.let.set()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the link is down"):
            made.check(ORDER[0])
    made.stream.close()


def test_a_layer_that_is_still_being_loaded_is_not_fetched() -> None:
    stream = LayerStream(ThreadCopies(), network(0).tensors())
    first = StreamedFFN(ORDER[0], network(ORDER[0][0]), stream)
    assert torch.equal(first.forward(ROWS, WEIGHTS), network(ORDER[0][0]).forward(ROWS, WEIGHTS))
    assert stream.copies == 1
    stream.close()


def test_calls_from_many_threads(streamed: Streamed) -> None:
    calls = [in_thread(partial(streamed.check, ORDER[number % 4])) for number in range(40)]
    for call in calls:
        call.result(SOON_S)


def test_adapters_are_of_one_layer(streamed: Streamed) -> None:
    random = np.random.default_rng(3)
    a, b = (random.standard_normal(shape, dtype=np.float32) for shape in ((2, WIDTH), (INNER, 2)))
    part = ExpertPart(gate=LowRank(a, b, 0.5))
    one, other = ORDER[0], ORDER[1]
    for ffn in (streamed.ffns[one], streamed.plain[one]):
        ffn.add_adapter(7, part)
    runs = (AdapterRows(0, 1), AdapterRows(7, 2))
    for _ in range(3):  # whichever buffer it comes to lie in
        adapted = streamed.ffns[one].forward(ROWS, WEIGHTS, runs)
        assert torch.equal(adapted, streamed.plain[one].forward(ROWS, WEIGHTS, runs))
        streamed.check(other)
        streamed.check(ORDER[2])
    assert streamed.ffns[one].has_adapter(7)
    assert not streamed.ffns[other].has_adapter(7)
    streamed.ffns[one].remove_adapter(7)
    assert not streamed.ffns[one].has_adapter(7)
    assert streamed.ffns[one].adapter_bytes == 0


def test_the_bytes_that_a_peer_gets_are_those_of_the_layer(streamed: Streamed) -> None:
    for key in ORDER:
        ours, plain = streamed.ffns[key].buffers(), streamed.plain[key].buffers()
        assert [bytes(each) for each in ours] == [bytes(each) for each in plain]
        assert streamed.ffns[key].nbytes == streamed.plain[key].nbytes


TOLD = [(layer, expert) for layer in (1, 3, 4) for expert in (0, 1, 2)]


class Shared:
    """The layers of three experts that go through the same two buffers."""

    def __init__(self, engine: ThreadCopies) -> None:
        self.plain = {key: network(10 * key[0] + key[1]) for key in TOLD}
        self.streams = LayerStreams(engine)
        made = {key: network(10 * key[0] + key[1]) for key in TOLD}
        self.stream = self.streams.of(network(0).tensors())
        self.ffns = {key: StreamedFFN(key, each, self.streams.of(each.tensors())) for key, each in made.items()}

    def check(self, key: tuple[int, int]) -> None:
        assert torch.equal(self.ffns[key].forward(ROWS, WEIGHTS), self.plain[key].forward(ROWS, WEIGHTS)), key

    def held(self) -> list[tuple[int, int]]:
        """Which layer's bytes each buffer has by now."""
        return [
            next(key for key in TOLD if all(map(torch.equal, buffer, self.plain[key].tensors())))
            for buffer in self.stream.buffers
        ]


@given(st.lists(st.lists(st.sampled_from(TOLD), max_size=5, unique=True), max_size=6), st.data())
def test_experts_that_share_buffers_give_the_bits_of_layers_in_place(
    told: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Some calls are told of and given up, some come untold, and those of two steps in turns."""
    made = Shared(ThreadCopies())
    for calls in told:
        for key in calls:
            made.streams.expect(key)
        for key in data.draw(st.lists(st.sampled_from(calls or TOLD), max_size=6)):
            made.check(key)
    made.streams.close()
    assert made.streams.buffer_bytes == 2 * sum(each.nbytes for each in network(0).tensors())


def test_calls_that_are_told_of_are_copied_once_and_nothing_else_is() -> None:
    """Two experts a layer, as a step of one sequence has them: the second is copied while the first is computed."""
    made = Shared(ThreadCopies())
    steps = [[(1, 0), (1, 2)], [(3, 1), (3, 2)], [(4, 1), (4, 2)], [(1, 1), (1, 2)]]
    for number, calls in enumerate(steps):
        for key in calls:
            made.streams.expect(key)
        made.check(calls[0])
        assert made.stream.copies == 2 * number + 2
        made.check(calls[1])
        assert made.stream.copies == 2 * number + 2, "it was there, and no layer is guessed"
    made.streams.close()


def test_a_step_that_calls_all_copies_the_next_layer_ahead() -> None:
    made = Shared(ThreadCopies())
    for _ in range(2):
        for layer in (1, 3, 4):
            for expert in (0, 1, 2):
                made.streams.expect((layer, expert))
            for expert in (0, 1, 2):
                made.check((layer, expert))
    assert made.stream.copies == 2 * len(TOLD) + 1, "each once in its order, and the one that comes next"
    made.streams.close()


def test_a_shared_buffer_that_another_expert_reads_is_not_copied_over() -> None:
    engine = Late()
    made = Shared(engine)
    engine.late = True
    first, second, third = (1, 0), (1, 1), (3, 2)
    for key in (first, second, third):
        made.streams.expect(key)
    made.check(first)
    made.check(second)  # and the third, of another expert, is to be copied to where the first is
    buffer = next(each for each in made.stream._buffers if each.key == third)
    assert sorted(made.held()) == [first, second]
    engine.running[1].set_result(None)
    assert not buffer.copied.done(), "the first is still being read"
    engine.running[0].set_result(None)
    buffer.copied.result(SOON_S)
    assert sorted(made.held()) == [second, third]
    made.check(third)
    for mark in engine.running[2:]:
        mark.set_result(None)
    made.streams.close()


def test_layers_of_unlike_shapes_have_buffers_of_their_own() -> None:
    streams = LayerStreams(ThreadCopies())
    wide, narrow = network(1), network(2, inner=8)
    ffns = [StreamedFFN((layer, 0), each, streams.of(each.tensors())) for layer, each in enumerate((wide, narrow))]
    assert streams.buffer_bytes == 2 * sum(t.nbytes for each in (wide, narrow) for t in each.tensors())
    for ffn, plain in zip(ffns, (network(1), network(2, inner=8)), strict=True):
        assert torch.equal(ffn.forward(ROWS, WEIGHTS), plain.forward(ROWS, WEIGHTS))
    streams.close()
    with pytest.raises(EngineError, match="this replica is ending"):
        ffns[0].forward(ROWS, WEIGHTS)


def test_what_can_be_moved() -> None:
    assert isinstance(network(0), Movable)
    assert isinstance(copies_to(torch.device("cpu")), ThreadCopies)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_gives_the_bits_of_layers_in_place() -> None:
    card = torch.device("cuda")
    plain = {key: network(key[0]) for key in ORDER}
    on_card = {key: plain[key].over([each.to(card) for each in plain[key].tensors()]) for key in ORDER}
    stream = LayerStream(CudaCopies(card), on_card[ORDER[0]].tensors())
    ffns = {key: StreamedFFN(key, on_card[key], stream) for key in ORDER}
    rows, weights = ROWS.to(card), WEIGHTS.to(card)
    for key in [*ORDER * 5, ORDER[2], ORDER[0], ORDER[0], ORDER[3]]:
        assert torch.equal(ffns[key].forward(rows, weights), on_card[key].forward(rows, weights))
    stream.close()
