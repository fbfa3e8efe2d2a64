"""A response as it grows: its items and its events, from the parts of an answer. No model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from moe_ray.api.failure import Failure
from moe_ray.api.job import ModelLimits
from moe_ray.api.output import Delta, JobOutput
from moe_ray.api.responses.answers import ResponseObject
from moe_ray.api.responses.parse import of_this_api, parse_request, plan_response
from moe_ray.api.responses.render import GrowingResponse, ResponseEvents
from moe_ray.core import TokenLogprobs
from moe_ray.errors import ExpertUnavailable, InvalidRequest
from moe_ray.text.answers.parts import CallArguments, CallBegun, Part, Text
from moe_ray.text.tokenizer import Tokenizer

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOLS = {"tools": [WEATHER], "tool_choice": "none"}
CALL = (CallBegun(0, "call_1", "weather"), CallArguments(0, '{"at": '), CallArguments(0, '"sea"}'))


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def growing(tokenizer: Tokenizer, **body: Any) -> GrowingResponse:
    request = parse_request(json.dumps({"input": "Hi", **body}).encode())
    plan = plan_response(request, [], tokenizer, ModelLimits(tokenizer.vocab_size, 1000), "resp_1")
    output = JobOutput.of(plan.job, tokenizer)
    return GrowingResponse(output, {**plan.echo, "model": "m", "store": True}, tokenizer, "in_progress")


def checked(raw: str) -> list[dict[str, Any]]:
    """The events of a stream, each as OpenAI's library knows it, numbered without a gap."""
    events = []
    for block in raw.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event, strict=True)
        if "response" in event:
            ResponseObject.model_validate(event["response"])
            Response.model_validate(event["response"], strict=True)
        events.append(event)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(events)))
    return events


def told(response: GrowingResponse, steps: Sequence[Sequence[Part]], finish: str = "stop") -> list[dict[str, Any]]:
    """All events of an answer of these parts."""
    events = ResponseEvents(response)
    raw = "".join(events.opening("created", "in_progress"))
    for parts in steps:
        raw += events.chunk(Delta(0, parts=parts))
    response._output.choices[0].finish_reason = finish  # type: ignore[assignment]
    return checked(raw + events.completed() + events.last())


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_message(tokenizer: Tokenizer) -> None:
    events = told(growing(tokenizer), [[Text("a")], [], [Text("b")]])
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    whole = events[-1]["response"]
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
    assert Response.model_validate(whole).output_text == "ab"
    assert whole["output"] == [events[-2]["item"]]
    assert events[0]["response"]["usage"] is None
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"]
    assert whole["completed_at"] >= whole["created_at"]


def test_a_call_behind_text_and_text_behind_a_call(tokenizer: Tokenizer) -> None:
    events = told(growing(tokenizer, **TOOLS), [[Text("I look.")], CALL[:2], [CALL[2], Text("Done.")]])
    assert kinds(events)[2:-1] == [
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
    ]
    first, call, second = events[-1]["response"]["output"]
    assert (first["content"][0]["text"], second["content"][0]["text"]) == ("I look.", "Done.")
    assert (call["type"], call["call_id"], call["name"]) == ("function_call", "call_1", "weather")
    assert json.loads(call["arguments"]) == {"at": "sea"}
    assert [event["output_index"] for event in events if "output_index" in event] == [0] * 6 + [1] * 5 + [2] * 6


def test_two_calls_and_no_text(tokenizer: Tokenizer) -> None:
    second = (CallBegun(1, "call_2", "weather"), CallArguments(1, "{}"))
    events = told(growing(tokenizer, **TOOLS), [CALL, second])
    output = events[-1]["response"]["output"]
    assert [(item["type"], item["call_id"], item["status"]) for item in output] == [
        ("function_call", "call_1", "completed"),
        ("function_call", "call_2", "completed"),
    ]


def test_an_answer_of_nothing_is_an_empty_message(tokenizer: Tokenizer) -> None:
    events = told(growing(tokenizer), [])
    (message,) = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == ""
    assert kinds(events)[2:4] == ["output_item.added", "content_part.added"]


def test_what_was_cut_off_says_so(tokenizer: Tokenizer) -> None:
    events = told(growing(tokenizer, **TOOLS), [[Text("a")], CALL[:2]], finish="length")
    assert events[-1]["type"] == "response.incomplete"
    whole = events[-1]["response"]
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in whole["output"]] == ["completed", "incomplete"]
    assert whole["completed_at"] is None


def test_logprobs_go_with_the_text_that_they_are_of(tokenizer: Tokenizer) -> None:
    response = growing(tokenizer, top_logprobs=1)
    token = tokenizer.encode("a")[0]
    events = ResponseEvents(response)
    likely = [TokenLogprobs(token, -0.5, ((token, -0.5),))]
    raw = events.chunk(Delta(0, token_ids=(token,), logprobs=likely, num_visible=1))  # its text is held back
    raw += events.chunk(Delta(0, token_ids=(token,), logprobs=likely, num_visible=1, parts=[Text("aa")]))
    raw += events.chunk(Delta(0, token_ids=(2,), logprobs=[TokenLogprobs(2, -0.1, ())], num_visible=0))
    response._output.choices[0].finish_reason = "stop"
    found = checked(raw + events.completed() + events.last())
    (delta,) = (event for event in found if event["type"] == "response.output_text.delta")
    assert [entry["token"] for entry in delta["logprobs"]] == ["a", "a"]
    (part,) = found[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == delta["logprobs"]
    assert part["logprobs"][0] == {
        "token": "a",
        "bytes": [97],
        "logprob": -0.5,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}],
    }


def test_a_failure_midway_keeps_what_there_is(tokenizer: Tokenizer) -> None:
    response = growing(tokenizer)
    events = ResponseEvents(response)
    raw = "".join(events.opening("created", "in_progress")) + events.chunk(Delta(0, parts=[Text("a")]))
    raw += events.failed(ExpertUnavailable("expert 3 at 10.0.0.3:4711 is gone")) + events.last()
    found = checked(raw)
    assert kinds(found)[-2:] == ["output_item.done", "failed"]
    whole = found[-1]["response"]
    assert (whole["status"], whole["error"]["code"]) == ("failed", "server_error")
    assert "10.0.0.3" not in whole["error"]["message"]
    assert whole["output"][0]["status"] == "incomplete"
    body = parse_request(json.dumps({"input": "Hi", "text": {"format": {"type": "json_object"}}}).encode())
    events = ResponseEvents(growing(tokenizer), partial(of_this_api, body=body))
    whole = checked(events.failed(InvalidRequest("`grammar` is none", "grammar")) + events.last())[-1]["response"]
    assert whole["error"] == {"code": "invalid_prompt", "message": "`text.format` is none"}
    response = growing(tokenizer)
    response.fail(Failure(429, "full"))
    assert response.whole()["error"] == {"code": "rate_limit_exceeded", "message": "full"}


def test_obfuscation_makes_deltas_equally_long(tokenizer: Tokenizer) -> None:
    events = ResponseEvents(growing(tokenizer), obfuscate=True)
    found = checked("".join(events.chunk(Delta(0, parts=[Text(text)])) for text in ("a", "bcd", "x" * 32)))
    lengths = [len(event["delta"]) + len(event["obfuscation"]) for event in found if "delta" in event]
    assert lengths == [32, 32, 64]
