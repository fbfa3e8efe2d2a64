"""Tools over Anthropic's API: its own client calls them in a loop, and requests of the form that coding agents send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest
from in_process import Trunk, served_beside

from moe_ray.api.sse import SseReader

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [WEATHER, CLOCK]
SCHEMAS: dict[str, Any] = {tool["name"]: tool["input_schema"] for tool in TOOLS}  # type: ignore[misc]
ASK: dict[str, Any] = {"model": "random", "max_tokens": 300, "messages": HELLO, "tools": TOOLS}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def url(chat_trunk: Trunk, chat_model: Path) -> Iterator[str]:
    with served_beside(chat_model, [chat_trunk.info], aliases=["claude-*"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def calls_of(message: anthropic.types.Message) -> list[anthropic.types.ToolUseBlock]:
    """The calls of an answer, each checked against its tool's schema."""
    calls = [block for block in message.content if block.type == "tool_use"]
    for call in calls:
        jsonschema.validate(call.input, SCHEMAS[call.name])
    return calls


def test_a_call_that_must_be_made_is_made(client: anthropic.Anthropic) -> None:
    one: dict[str, Any] = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(**ASK, tool_choice=one, extra_body=GREEDY)
    [call] = calls_of(message)
    assert (message.stop_reason, message.content) == ("tool_use", [call])
    with client.messages.stream(**ASK, tool_choice=one, extra_body=GREEDY) as stream:
        kinds = [(event.type, getattr(getattr(event, "delta", None), "type", "")) for event in stream]
        final = stream.get_final_message()
    assert [(each.name, each.input) for each in calls_of(final)] == [(call.name, call.input)]
    assert final.stop_reason == "tool_use"
    assert ("content_block_delta", "input_json_delta") in kinds
    assert [kind for kind, _ in kinds if kind.startswith("content_block_st")] == [
        "content_block_start",
        "content_block_stop",
    ]
    named = client.messages.create(**ASK, tool_choice={"type": "tool", "name": "clock"}, extra_body=GREEDY)
    assert {each.name for each in calls_of(named)} == {"clock"}
    assert all(each.input == {} for each in calls_of(named))


def test_a_conversation_of_several_calls(client: anthropic.Anthropic) -> None:
    turns: list[Any] = list(HELLO)
    prompts: list[int] = []
    for turn in range(3):
        prompts.append(client.messages.count_tokens(model="random", messages=turns, tools=TOOLS).input_tokens)
        with client.messages.stream(
            **{**ASK, "messages": turns, "max_tokens": 400}, tool_choice={"type": "any"}, extra_body={"seed": turn}
        ) as stream:
            message = stream.get_final_message()
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == prompts[-1]
        calls = calls_of(message)
        assert calls
        assert message.stop_reason == "tool_use"
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": f"{turn} degrees"}]}
            for call in calls
        ]
        turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert prompts == sorted(set(prompts))
    none = client.messages.create(**{**ASK, "messages": turns, "max_tokens": 8}, tool_choice={"type": "none"})
    assert not calls_of(none)


def test_calls_and_results_that_do_not_fit_together_are_refused(client: anthropic.Anthropic) -> None:
    def call(call_id: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": call_id, "name": "clock", "input": {}}

    def result(call_id: str) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": call_id, "content": "noon"}

    for turns, said in (
        ([assistant(call("a")), user({"type": "text", "text": "and?"})], "messages.2.*without a `tool_result`.*'a'"),
        ([assistant(call("a"), call("b")), user(result("a"))], "messages.2.*without a `tool_result`.*'b'"),
        ([assistant(call("a")), user(result("a"), result("a"))], "messages.2.content.1.*'a'"),
        ([assistant(call("a"), call("a")), user(result("a"))], "messages.1.content.1.id.*'a'"),
        ([assistant(call("a")), user(result("a")), assistant(call("b")), user(result("a"))], "messages.4.content.0"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=said):
            client.messages.create(**{**ASK, "messages": [*HELLO, *turns]})
    for tools, said in (
        ([CLOCK, CLOCK], "clock"),
        ([{**CLOCK, "name": "no spaces"}], "tools.0"),
        ([{**CLOCK, "input_schema": {"type": "array"}}], "tools.0"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=said):
            client.messages.create(**{**ASK, "tools": tools})


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def test_a_schema_of_the_answer(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted: Any = {"format": {"type": "json_schema", "schema": schema}}
    bad: Any = {"format": {"type": "json_schema", "schema": {"$ref": "#/nowhere"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"`output_config\.format`"):
        client.messages.create(model="random", max_tokens=60, messages=HELLO, output_config=bad)
    answer = client.messages.create(model="random", max_tokens=60, messages=HELLO, output_config=wanted)
    assert answer.content[0].type == "text"
    jsonschema.validate(json.loads(answer.content[0].text), schema)


def test_a_call_that_the_length_cuts_is_the_same_whole_and_streamed(client: anthropic.Anthropic) -> None:
    cut: dict[str, Any] = {**ASK, "max_tokens": 12, "tool_choice": {"type": "tool", "name": "weather"}}
    whole = client.messages.create(**cut, extra_body=GREEDY)
    with client.messages.stream(**cut, extra_body=GREEDY) as stream:
        final = stream.get_final_message()
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert [each.to_dict() for each in whole.content if each.type == "text"] == [
        {"type": "text", "text": each.text} for each in final.content if each.type == "text"
    ]
    assert [(each.name, each.input) for each in whole.content if each.type == "tool_use"] == [
        (each.name, each.input) for each in final.content if each.type == "tool_use"
    ]


# ---- what a coding agent sends


def cached(block: dict[str, Any]) -> dict[str, Any]:
    return {**block, "cache_control": {"type": "ephemeral"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def agent_request(billing: str) -> dict[str, Any]:
    """In the form of the public documentation: a turn of many tools, cached blocks, and a task."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"path": {"type": "string", "description": "Absolute"}, "limit": {"type": "number"}},
        "required": ["path"],
        "additionalProperties": False,
    }
    names = ["Bash", "Edit", "Glob", "Grep", "Read", "Task", "TodoWrite", "Write", "mcp__issues__list"]
    tools = [{"name": name, "description": f"{name} something.", "input_schema": schema} for name in names]
    return {
        "model": "claude-sonnet-4-5-20250929",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "metadata": {"user_id": "user_0_account__session_1"},
        "system": [
            text(f"x-anthropic-billing-header: cc_version=2.1.77.f00; cc_entrypoint=cli; cch={billing};"),
            cached(text("You are a coding agent.")),
            cached(text("Follow the instructions. " * 20)),
        ],
        "tools": [*tools[:-1], cached(tools[-1])],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "messages": [
            user(text("<system-reminder>\nIt is Friday.\n</system-reminder>"), cached(text("Name the files.")))
        ],
        # A random model would go on and on.
        "stop_sequences": [],
    }


HEADERS = {
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,fine-grained-tool-streaming-2025-05-14",
    "anthropic-version": "2023-06-01",
    "anthropic-dangerous-direct-browser-access": "true",
    "authorization": "Bearer none",
    "user-agent": "an-agent/2.0 (external, cli)",
    "x-app": "cli",
    "x-stainless-retry-count": "0",
}


def test_a_coding_agents_requests_are_answered(url: str) -> None:
    call = {"type": "tool_use", "id": "toolu_01A09q90qw90lq917835lq9", "name": "Read", "input": {"path": "/a"}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "1\tline", "is_error": False}
    turns = [
        assistant({"type": "thinking", "thinking": "hm", "signature": "x"}, text("I read it."), call),
        user(cached(result)),
    ]
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60, trust_env=False) as agent:
        first, second = agent_request("11111"), agent_request("22222")
        second["messages"] += turns
        usages = []
        for request in (first, second):
            counted = agent.post("/v1/messages/count_tokens?beta=true", json=request)
            assert counted.status_code == 200, counted.text
            response = agent.post("/v1/messages?beta=true", json={**request, "max_tokens": 20, "ignore_eos": True})
            assert response.status_code == 200, response.text
            events = [json.loads(data) for data in SseReader().feed(response.content)]
            assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
                *("message_start", "message_delta", "message_stop"),
            ]
            usage = events[-2]["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted.json()["input_tokens"]
            usages.append(usage)
        assert usages[1]["cache_read_input_tokens"] > 0.9 * sum(
            usages[0][kind] for kind in ("input_tokens", "cache_read_input_tokens")
        )
        assert agent.get("/v1/models?limit=1000").json()["has_more"] is False
