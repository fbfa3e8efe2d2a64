"""The engine's own rules and its thread: what is refused, what one failed step costs, that nobody waits for ever."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams, TokenEvent
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.engine.loop import EngineLoop
from moe_ray.errors import ConfigError, EngineError, ExpertUnavailable, InvalidRequest, Overloaded
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.client.options import DispatchOptions
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.moe import Experts, PendingCalls, Routed

torch.set_num_threads(1)


class Fragile:
    """The experts of the model, which fail when told to."""

    def __init__(self, inner: Experts) -> None:
        self.inner = inner
        self.error: Exception | None = None

    def submit(self, layer: int, routed: Routed) -> PendingCalls:
        if self.error is not None and layer == 2:
            raise self.error
        return self.inner.submit(layer, routed)


class Rig:
    def __init__(self, directory: Path, **engine: Any) -> None:
        config = load_config(
            {"model": {"dtype": "float32", "device": "cpu"}, "engine": {"kv_cache_gib": 0.01, **engine}}
        )
        checkpoint = Checkpoint.open(directory)

        def experts(compute: Any) -> Fragile:
            self.experts = Fragile(local_experts(checkpoint, compute))
            return self.experts

        self.engine: Engine = build_engine(config, checkpoint, experts)


def ask(name: str, prompt: tuple[int, ...] = (5, 6, 7), output: tuple[int, ...] = (), **sampling: Any) -> Request:
    return Request(name, prompt, SamplingParams(**{"max_tokens": 6, "temperature": 0, **sampling}), output)


def finish(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
    return events


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (ask("r", prompt=()), "empty"),
        (ask("r", prompt=(1, 512)), "`prompt`"),
        (ask("r", prompt=(-1,)), "`prompt`"),
        (ask("r", output=(512,)), "`output_token_ids`"),
        (ask("r", output=(1, 2, 3, 4, 5, 6)), "max_tokens"),
        (ask("r", logit_bias={600: 1.0}), "`logit_bias`"),
        (ask("r", stop_token_ids=(9999,)), "`stop_token_ids`"),
        (ask("r", prompt=(1,) * 512), "maximum context length"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(random_model: Path, request_: Request, named: str) -> None:
    engine = Rig(random_model).engine
    with pytest.raises(InvalidRequest, match=named):
        engine.submit(request_)
    assert not engine.has_work
    engine.submit(ask("r"))
    assert len(finish(engine)["r"]) <= 6


def test_the_queue_is_bounded(random_model: Path) -> None:
    engine = Rig(random_model, max_waiting=2).engine
    engine.submit(ask("a"))
    engine.submit(ask("b"))
    with pytest.raises(Overloaded):
        engine.submit(ask("c"))
    with pytest.raises(InvalidRequest, match="already in use"):
        engine.submit(ask("a"))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_failed_step_ends_its_requests_and_no_others(random_model: Path, micro_batches: int) -> None:
    rig = Rig(random_model, max_num_seqs=2, micro_batches=micro_batches)
    expected = [e.token_ids for e in finish_one(rig.engine, "c")]
    for name in "abc":
        rig.engine.submit(ask(name))
    rig.engine.step()
    rig.experts.error = ExpertUnavailable("expert 3 (layer 2) is unavailable")
    events = rig.engine.step()
    assert {(e.request_id, type(e.error)) for e in events} == {("a", ExpertUnavailable), ("b", ExpertUnavailable)}
    assert all(e.last for e in events)
    rig.engine.check_integrity()
    rig.experts.error = None
    rest = finish(rig.engine)
    assert list(rest) == ["c"]
    assert [e.token_ids for e in rest["c"]] == expected
    assert rig.engine.stats().kv_blocks_free == rig.engine.stats().kv_blocks_total


def finish_one(engine: Engine, name: str) -> list[TokenEvent]:
    engine.submit(ask(name))
    return finish(engine)[name]


def test_a_cache_too_small_for_anything_is_a_config_error(random_model: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        Rig(random_model, kv_cache_gib=1e-9)


def collect(events: queue.SimpleQueue[list[TokenEvent]], name: str) -> list[TokenEvent]:
    own: list[TokenEvent] = []
    while not own or not own[-1].last:
        own += [event for event in events.get(timeout=30) if event.request_id == name]
    return own


def test_the_loop_serves_aborts_and_tells_everybody_of_its_end(random_model: Path) -> None:
    loop = EngineLoop(Rig(random_model).engine)
    events: queue.SimpleQueue[list[TokenEvent]] = queue.SimpleQueue()
    sink = events.put
    loop.submit(ask("a"), sink)
    assert collect(events, "a")[-1].finish_reason is not None
    loop.submit(ask("bad", prompt=()), sink)
    assert isinstance(collect(events, "bad")[-1].error, InvalidRequest)
    loop.submit(ask("long", max_tokens=500, ignore_eos=True), sink)
    loop.close()
    assert isinstance(collect(events, "long")[-1].error, EngineError)
    loop.submit(ask("late"), sink)
    assert isinstance(collect(events, "late")[-1].error, EngineError), "nobody is left to answer, so it must be said"


def test_a_fault_of_the_engine_reaches_live_and_later_requests(random_model: Path) -> None:
    rig = Rig(random_model)
    rig.experts.error = ZeroDivisionError("a bug")
    loop = EngineLoop(rig.engine)
    events: queue.SimpleQueue[list[TokenEvent]] = queue.SimpleQueue()
    sink = events.put
    for name in ("first", "later"):
        loop.submit(ask(name), sink)
        assert isinstance(collect(events, name)[-1].error, EngineError)
    assert isinstance(loop.failure, ZeroDivisionError)
    loop.close()


def test_a_lost_expert_can_be_left_out_and_every_position_without_it_is_told(random_model: Path) -> None:
    whole, rig = Rig(random_model), Rig(random_model)
    prompt = tuple(range(5, 45))
    whole.engine.submit(ask("a", prompt, logprobs=1))
    right = finish(whole.engine)
    assert not any(event.degraded_positions for event in right["a"])
    pool = rig.experts.inner
    assert isinstance(pool, ExpertDispatcher)
    pool.options = DispatchOptions(on_loss="renormalise", in_process=True)
    (lost,) = [replica for replica in pool.table.replicas() if replica.replica_id.startswith("Expert3")]
    lost.link.close()
    rig.engine.submit(ask("a", prompt, logprobs=1))
    events = finish(rig.engine)["a"]
    told = [position for event in events for position in event.degraded_positions]
    assert told == sorted(set(told))
    assert 0 < len(told) < 45, "those tokens that wanted expert 3 in some layer"
    assert told[-1] < len(prompt) + 5
    assert rig.engine.stats().degraded_tokens == len(told)
    assert [e.logprobs[0].logprob for e in events] != [e.logprobs[0].logprob for e in right["a"]]
    rig.engine.submit(ask("b", prompt))
    again = finish(rig.engine)["b"]
    assert again[-1].num_cached_tokens <= min(told), "what was computed without an expert is nobody else's prefix"
    pool.options = DispatchOptions(on_loss="fail", in_process=True)
    rig.engine.submit(ask("c", prompt))
    (failed,) = finish(rig.engine)["c"]
    assert isinstance(failed.error, ExpertUnavailable)
