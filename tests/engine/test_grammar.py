"""Constrained decoding: outputs match, other rows do not notice, and a stream that is interrupted goes on as before."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from constrained import EOS, Answer, Rig, ask

from moe_ray.core import Request, TokenEvent
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.errors import InvalidRequest, Overloaded
from moe_ray.sampling import Grammar

THING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
}
TAGGED = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": THING}, "end": "</f>"},
}
GRAMMARS = {
    "json_object": Grammar("json_object"),
    "json_schema": Grammar("json_schema", json.dumps(THING)),
    "regex": Grammar("regex", r"[a-z]{2,9}@(ex|am)\.(com|org)( and more)?"),
    "ebnf": Grammar("ebnf", 'root ::= item{2, 5} "."\nitem ::= "(" [a-c]{1, 4} ")"'),
    "structural_tag": Grammar("structural_tag", json.dumps(TAGGED)),
    "repeating": Grammar("ebnf", 'root ::= ("abcabc" | "xyz, "){8, 20} "!"'),
}  # fmt: skip
DRAFTS = {"num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
NO_TOKEN = "leave no token"


def checks(kind: str, text: str) -> bool:
    match kind:
        case "json_object":
            return isinstance(json.loads(text), dict)
        case "json_schema":
            value = json.loads(text)
            return set(value) == {"name", "tags"} and len(value["name"]) <= 6 and set(value["tags"]) <= {"a", "é"}
        case "structural_tag":
            return checks("json_schema", text.removeprefix("<f>").removesuffix("</f>"))
        case "regex":
            return re.fullmatch(GRAMMARS["regex"].source, text) is not None
        case "ebnf":
            return re.fullmatch(r"(\([a-c]{1,4}\)){2,5}\.", text) is not None
        case _:
            return re.fullmatch(r"(abcabc|xyz, ){8,20}!", text) is not None


def mixed(rig: Rig, **sampling: Any) -> list[Request]:
    """Requests of every kind of grammar and as many without one, side by side."""
    found = []
    for i, (kind, grammar) in enumerate(GRAMMARS.items()):
        own = {"logit_bias": rig.blanks, "seed": i, "temperature": i % 2, **sampling}
        prompt = tuple(range(30 + i, 60)) * 2
        found.append(ask(grammar, kind, prompt, **own))
        found.append(ask(None, f"free {kind}", prompt, **{**own, "max_tokens": 40, "ignore_eos": True, "logprobs": 1}))
    return found


def ends_well(found: dict[str, Answer]) -> int:
    """How many answers ended before their limit; all that did match."""
    ended = 0
    for kind in GRAMMARS:
        assert found[kind].error is None
        if found[kind].finish_reason == "stop":
            assert checks(kind, found[kind].text), (kind, found[kind].text)
            ended += 1
    return ended


@pytest.fixture(scope="module")
def alone(rig: Rig) -> dict[str, Answer]:
    """Each request in an engine of its own."""
    return {request.request_id: rig.answer(request) for request in mixed(rig)}


def test_every_kind_is_matched(alone: dict[str, Answer]) -> None:
    assert ends_well(alone) == len(GRAMMARS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        DRAFTS,
        {"blocks": 40},
        {"blocks": 40, "enable_prefix_caching": False, **DRAFTS},
        {"max_num_batched_tokens": 9, "max_num_seqs": 4, **DRAFTS},
    ],
    ids=["batch", "drafts", "preemption", "preemption and drafts", "chunks and drafts"],
)
def test_rows_do_not_notice_each_other(rig: Rig, alone: dict[str, Answer], options: dict[str, Any]) -> None:
    """The same tokens alone and in a batch, with and without drafts, preempted or not, with a grammar or without."""
    found, stats = rig.answers(mixed(rig), **options)
    assert found == alone
    assert (stats.preemptions > 0) == ("blocks" in options)
    if "num_speculative_tokens" in options:
        assert stats.draft_tokens > stats.accepted_draft_tokens > 0


def test_drafts_that_the_grammar_refuses_are_not_verified(rig: Rig) -> None:
    """The prompt says what comes next, but the grammar wants something else."""
    tokenizer = rig.tokenizer
    prompt = tuple(tokenizer.encode("ab!ab!ab!ab!ab!ab!ab!a"))
    wrong = ask(Grammar("regex", "[01]x[23]y"), prompt=prompt, temperature=0)
    right = ask(Grammar("regex", "(b!a){10}"), prompt=prompt, temperature=0)
    refused, stats = rig.answers([wrong], **DRAFTS)
    assert refused["r"] == rig.answer(wrong)
    accepted, other = rig.answers([right], **DRAFTS)
    assert accepted["r"] == rig.answer(right)
    assert other.steps < 16 < len(accepted["r"].token_ids)
    assert other.accepted_draft_tokens > 0.8 * other.draft_tokens
    assert stats.draft_tokens == 0


@pytest.mark.parametrize("kind", ["json_schema", "repeating"])
def test_a_replayed_stream_goes_on_as_before(rig: Rig, alone: dict[str, Answer], kind: str) -> None:
    request = next(request for request in mixed(rig) if request.request_id == kind)
    tokens = alone[kind].token_ids
    replays = [replace(request, request_id=f"at {n}", output_token_ids=tokens[:n]) for n in range(0, len(tokens), 7)]
    found, _ = rig.answers(replays, **DRAFTS)
    for replay in replays:
        answer = found[replay.request_id]
        assert replay.output_token_ids + answer.token_ids == tokens
        assert answer.finish_reason == "stop"


def test_logprobs_are_those_of_the_raw_logits(rig: Rig) -> None:
    engine = rig.engine()
    one = {"logprobs": 3, "temperature": 0, "max_tokens": 1}
    engine.submit(ask(Grammar("regex", "[a-z]{20}"), "held", **one))
    engine.submit(ask(None, "free", **one))
    events: dict[str, TokenEvent] = {}
    while len(events) < 2:
        engine.wait()
        events |= {event.request_id: event for event in engine.step()}
    held, free = events["held"].logprobs[0], events["free"].logprobs[0]
    assert [token for token, _ in held.top] == [token for token, _ in free.top]
    assert held.logprob < free.logprob


def test_how_answers_end(rig: Rig) -> None:
    digits = next(i for i in range(512) if rig.tokenizer.token_bytes(i) == b"7")
    yes, many = Grammar("regex", "yes|no"), Grammar("regex", "[0-9]{3,}")
    # Nothing may follow: the end, at once, also before min_tokens and where no token ends a sequence.
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 50}, {"stop_token_ids": (digits,)}):
        answer = rig.answer(ask(yes, **more))
        assert (answer.text in ("yes", "no"), answer.finish_reason, answer.stop_token_id) == (True, "stop", None)
    # An end token may come as soon as the text matches, and not before.
    eager = {"logit_bias": {EOS: 100.0}}
    answer = rig.answer(ask(many, **eager))
    assert re.fullmatch("[0-9]{3,5}", answer.text)
    assert (answer.finish_reason, answer.stop_token_id) == ("stop", EOS)
    answer = rig.answer(ask(many, **eager, min_tokens=12))
    assert len(answer.token_ids) == 13
    assert answer.stop_token_id == EOS
    answer = rig.answer(ask(many, **eager, ignore_eos=True, max_tokens=20))
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 20)
    assert EOS not in answer.token_ids
    # A stop token that the grammar allows ends the answer where it comes, as a stop string does.
    answer = rig.answer(ask(many, logit_bias={digits: 100.0}, stop_token_ids=(digits,)))
    assert (answer.text, answer.finish_reason, answer.stop_token_id) == ("", "stop", digits)
    # The last token that fits makes the text match: that is its end, not the limit.
    answer = rig.answer(ask(Grammar("regex", "7"), max_tokens=1))
    assert (answer.text, answer.finish_reason) == ("7", "stop")


def test_biases_against_all_that_may_come_change_nothing_but_the_order(rig: Rig) -> None:
    every = dict.fromkeys(range(512), -100.0)
    assert rig.answer(ask(Grammar("regex", "yes"), logit_bias=every)).text == "yes"


def test_a_request_that_allows_no_token_ends_in_an_error_that_says_so(rig: Rig) -> None:
    letter = next(i for i in range(512) if rig.tokenizer.token_bytes(i) == b"q")
    not_yet = ask(Grammar("regex", "q+"), "not yet", stop_token_ids=(letter,), min_tokens=3)
    others = ask(Grammar("regex", "q+"), "others", allowed_token_ids=(letter + 1, letter + 2))
    found, _ = rig.answers([not_yet, others, ask(Grammar("regex", "yes"), "beside")])
    for name in ("not yet", "others"):
        assert isinstance(found[name].error, InvalidRequest)
        assert NO_TOKEN in str(found[name].error)
    assert found["beside"].text == "yes"


@pytest.mark.parametrize(
    ("grammar", "output", "told", "param"),
    [
        (Grammar("regex", "(a"), (), "parenthesis is not closed", "grammar"),
        (Grammar("ebnf", "root ::= other"), (), '"other" is not defined', "grammar"),
        (Grammar("ebnf", 'start ::= "a"'), (), "root", "grammar"),
        (Grammar("json_schema", '{"type":'), (), "no JSON", "grammar"),
        (Grammar("json_schema", "3"), (), "should be an object or bool", "grammar"),
        (Grammar("json_schema", '{"type": "text"}'), (), 'Unsupported type "text"', "grammar"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), (), "nowhere", "grammar"),
        (Grammar("structural_tag", '{"type": "tag"}'), (), "structural tag", "grammar"),
        (Grammar("regex", ""), (), "it is complete", "grammar"),
        (Grammar("regex", "yes"), (40, 41), "token 40 at position 0", "output_token_ids"),
    ],
)
def test_what_is_refused_says_why(rig: Rig, grammar: Grammar, output: tuple[int, ...], told: str, param: str) -> None:
    found, _ = rig.answers([ask(grammar, output=output), ask(Grammar("regex", "yes"), "beside")])
    error = found["r"].error
    assert isinstance(error, InvalidRequest)
    assert error.param == param
    assert told in str(error)
    assert not re.search(r"\.cc:|\.py|Check failed|0x", str(error)), "where in the code it comes from"
    assert found["beside"].text == "yes"


def test_without_a_tokenizer_there_is_no_grammar(rig: Rig) -> None:
    engine = Engine(rig.trunk, EngineOptions(64, 8, max_model_len=200))
    with pytest.raises(InvalidRequest, match="needs the model's tokenizer") as error:
        engine.submit(ask(Grammar("json_object")))
    assert error.value.param == "grammar"


def test_requests_that_wait_for_their_grammar_count_and_can_be_dropped(rig: Rig) -> None:
    engine = rig.engine(max_waiting=2)
    new = Grammar("regex", f"[a-z]{{{time.monotonic_ns() % 50 + 2}}}x?")
    engine.submit(ask(new, "a"))
    engine.submit(ask(new, "b"))
    with pytest.raises(Overloaded):
        engine.submit(ask(new, "c"))
    assert engine.stats().num_waiting == 2
    assert engine.abort("a")
    assert not engine.abort("a")
    engine.wait()
    assert engine.step()[0].request_id == "b"
    assert engine.abort("b")
    assert not engine.has_work
    engine.check_integrity()
