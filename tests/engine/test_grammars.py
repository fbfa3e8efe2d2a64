"""Compiled grammars: hostile sources cost nobody else much, what is kept is bounded, a lost process comes back."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from constrained import EOS, Rig, ask

from moe_ray.core import TokenEvent
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.grammar import grammars as bounds
from moe_ray.engine.grammar import state as grammar_state
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.grammar.source import compile_source, grammar_compiler, tokenizer_info
from moe_ray.engine.grammar.state import CompiledSource, GrammarState
from moe_ray.engine.grammar.trial_process import MOST_CPU_S
from moe_ray.engine.loop import EngineLoop
from moe_ray.errors import CheckpointError, EngineError, InvalidRequest, Overloaded
from moe_ray.sampling import MAX_GRAMMAR_CHARACTERS, Grammar
from moe_ray.text.vocabulary import token_bytes

WAIT_S = 100


@pytest.fixture
def own(rig: Rig) -> Iterator[Grammars]:
    """Grammars that a test may do anything to."""
    found = Grammars(lambda: token_bytes(rig.tokenizer), 512, frozenset({EOS}))
    yield found
    found.close()


def state(grammars: Grammars, grammar: Grammar) -> GrammarState:
    return grammars.state(ask(grammar)).result(WAIT_S)


def schema(content: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(content))


def nested(depth: int) -> str:
    return '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth


def exponential() -> dict[str, Any]:
    both = [{"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(30)]
    defs = {f"d{i}": {"type": "object", "properties": properties} for i, properties in enumerate(both)}
    return {"$defs": {**defs, "d30": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def many_rules() -> str:
    rules = [f'r{i} ::= r{i + 1} r{i + 1} | "{i}"' for i in range(400)]
    return "\n".join([*rules, 'r400 ::= "x"', "root ::= r0"])


HOSTILE = {
    "many items": schema({"type": "array", "items": {"type": "integer"}, "maxItems": 100_000}),
    "a long string": schema({"type": "string", "maxLength": 1_000_000}),
    "repetition": Grammar("regex", "a{1,100000}"),
    "repeated repetition": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "nested groups": Grammar("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "nested rules": Grammar("ebnf", "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "nested JSON": Grammar("json_schema", nested(900)),
    "more nested JSON": Grammar("json_schema", nested(6_000)),
    "twice as many each time": schema(exponential()),
    "itself": schema({"$ref": "#"}),
    "left recursion": Grammar("ebnf", 'root ::= root root | "a" | ""'),
    "many rules": Grammar("ebnf", many_rules()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sources_end_in_time(rig: Rig, name: str) -> None:
    """In a grammar or in an error that names it; neither takes the process that tries them out along."""
    ready = rig.grammars.state(ask(HOSTILE[name]))
    error = ready.exception(WAIT_S)
    if error is not None:
        assert isinstance(error, InvalidRequest)
        assert error.param == "grammar"
        assert len(str(error)) < 600
    assert isinstance(state(rig.grammars, Grammar("regex", "yes|no")), GrammarState)


def slow() -> Grammar:
    """Takes more than what is given."""
    names = [f"{i:x}{i * 7919:o}" for i in range(4000)]
    return schema({"type": "object", "properties": {name: {"type": "string", "maxLength": 150} for name in names}})


@pytest.mark.slow
def test_other_streams_go_on_while_a_hostile_grammar_is_tried_out(own: Grammars, rig: Rig) -> None:
    """It takes seconds of a core until it is refused; its own request alone waits for it, and it is not tried twice."""
    loop = EngineLoop(Engine(rig.trunk, EngineOptions(256, 8, max_model_len=200, eos_token_ids=frozenset({EOS})), own))
    events: queue.SimpleQueue[list[TokenEvent]] = queue.SimpleQueue()
    loop.submit(ask(slow(), "hostile"), events.put)
    loop.submit(ask(None, "free", max_tokens=60, ignore_eos=True), events.put)
    loop.submit(ask(Grammar("regex", "[ab]{30}"), "held"), events.put)
    ended: list[TokenEvent] = []
    while len(ended) < 3:
        ended += [event for event in events.get(timeout=WAIT_S) if event.last]
    assert ended[-1].request_id == "hostile"
    assert f"more than {MOST_CPU_S} s" in str(ended[-1].error)
    started = time.monotonic()
    loop.submit(ask(slow(), "again"), events.put)
    assert isinstance(events.get(timeout=WAIT_S)[0].error, InvalidRequest)
    assert time.monotonic() - started < MOST_CPU_S / 2
    assert loop.failure is None
    process = child(own)
    loop.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(WAIT_S)
    assert not process.is_running()


def test_a_lost_process_comes_back(own: Grammars) -> None:
    assert isinstance(state(own, Grammar("regex", "a1")), GrammarState)
    os.kill(child(own).pid, signal.SIGKILL)
    for attempt in range(20):  # the first may be told of the loss, and is not kept
        with contextlib.suppress(EngineError):
            assert isinstance(state(own, Grammar("regex", f"a2{attempt // 10}")), GrammarState)
            break
    else:
        pytest.fail("no process")
    assert child(own).is_running()


def test_what_is_kept_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = rig.grammars
    first = state(grammars, Grammar("regex", "kept first"))
    assert state(grammars, Grammar("regex", "kept first"))._compiled is first._compiled
    monkeypatch.setattr(bounds, "MOST_KEPT", 3)
    held = [state(grammars, Grammar("regex", f"k{i}")) for i in range(6)]
    assert grammars.num_kept <= 4
    again = state(grammars, Grammar("regex", "kept first"))
    assert again._compiled is not first._compiled, "it was used longest ago"
    del first, again
    monkeypatch.setattr(bounds, "MOST_KEPT_BYTES", 1)
    monkeypatch.setattr(bounds, "MOST_LIVE_BYTES", sum(each._compiled.nbytes for each in held))
    with pytest.raises(Overloaded):
        state(grammars, Grammar("regex", "k7"))
    del held
    gc.collect()
    assert grammars.live_bytes < bounds.MOST_LIVE_BYTES
    assert isinstance(state(grammars, Grammar("regex", "k7")), GrammarState)


def test_a_grammar_that_is_too_slow_for_its_tokens_ends_its_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_state, "MOST_TOKEN_S", 0.0)
    found, _ = rig.answers([ask(Grammar("regex", "[ab]+")), ask(None, "free", max_tokens=3, ignore_eos=True)])
    assert "too ambiguous" in str(found["r"].error)
    assert len(found["free"].token_ids) == 3


def test_a_vocabulary_that_cannot_be_read_is_told(rig: Rig) -> None:
    def missing() -> list[bytes | None]:
        raise CheckpointError("no tokenizer in /model")

    with pytest.raises(InvalidRequest, match="needs the model's tokenizer: no tokenizer") as error:
        state(Grammars(missing, 512, frozenset()), Grammar("json_object"))
    assert error.value.param == "grammar"


def test_a_vocabulary_that_cannot_go_on_is_told(rig: Rig) -> None:
    def without_z() -> list[bytes | None]:
        return [None if text and b"z" in text else text for text in token_bytes(rig.tokenizer)]

    compiler = grammar_compiler(tokenizer_info(without_z(), 512))
    compiled = CompiledSource(compile_source(compiler, Grammar("regex", "z")), 512, 1)
    held = GrammarState(compiled, (EOS,), ())
    held.fill(np.zeros((1, 17), np.uint32), ())
    assert "the vocabulary has no token" in str(held.failure)


def test_the_source_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="characters") as error:
        Grammar("regex", "a" * (MAX_GRAMMAR_CHARACTERS + 1))
    assert error.value.param == "grammar"


def child(grammars: Grammars) -> psutil.Process:
    """The process that tries out."""
    assert grammars._compiler is not None
    return psutil.Process(grammars._compiler.trials._process.pid)
