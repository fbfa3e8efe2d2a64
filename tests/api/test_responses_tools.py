"""Functions and formats by /v1/responses, with OpenAI's own client and a real engine that is held to grammars."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from in_process import Trunk, served
from pydantic import BaseModel

from moe_ray.api.responses.memory import ResponseMemory

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather at a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"enum": ["sea", "land"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["place", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}
NOW: Any = {**WEATHER, "name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
GREEDY: dict[str, Any] = {"model": "random", "temperature": 0, "max_output_tokens": 200, "parallel_tool_calls": False}


class Trip(BaseModel):
    """What an answer is to be."""

    goal: Literal["sea", "land"]
    nights: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(kernel_model: Path, runner: asyncio.Runner) -> Iterator[openai.AsyncOpenAI]:
    """OpenAI's client of one gateway, whose model has a whole vocabulary and random weights."""
    trunk = Trunk(kernel_model)
    gateway = served(kernel_model, [trunk.info], responses=ResponseMemory(10**7, 100))
    http = runner.run(gateway.__aenter__())
    with_loop = openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    yield with_loop
    runner.run(with_loop.close())
    runner.run(gateway.__aexit__(None, None, None))
    trunk.close()


def test_a_loop_of_calls_and_outputs(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        both = [WEATHER, NOW]
        first = await client.responses.create(
            input="Go?", tools=both, tool_choice={"type": "function", "name": "weather"}, **GREEDY
        )
        assert first.status == "completed"
        (call,) = first.output
        assert call.type == "function_call"
        assert (call.name, call.status) == ("weather", "completed")
        assert json.loads(call.arguments)["place"] in ("sea", "land")
        outputs: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        second = await client.responses.create(
            input=outputs, previous_response_id=first.id, tools=both, tool_choice="required", **GREEDY
        )
        assert {each.type for each in second.output} == {"function_call"}
        said: Any = [{"role": "user", "content": "Go?"}, *first.output, *outputs]
        again = await client.responses.create(input=said, tools=both, tool_choice="required", **GREEDY)
        assert again.usage is not None
        assert second.usage is not None
        assert again.usage.input_tokens == second.usage.input_tokens
        assert [each.to_dict()["arguments"] for each in again.output] == [
            each.to_dict()["arguments"] for each in second.output
        ]
        with pytest.raises(openai.BadRequestError, match="No tool output found for function call"):
            await client.responses.create(input="And?", previous_response_id=second.id, **GREEDY)
        outputs = [
            {"type": "function_call_output", "call_id": each.to_dict()["call_id"], "output": "noon"}
            for each in second.output
        ]
        last = await client.responses.create(
            input=[*outputs, {"role": "user", "content": "So?"}],
            previous_response_id=second.id,
            tools=[WEATHER],
            tool_choice="none",
            model="random",
            max_output_tokens=8,
        )
        assert {each.type for each in last.output} == {"message"}

    runner.run(ask())


def test_one_call_at_a_time_and_which(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
        made = await client.responses.create(input="?", tools=[WEATHER, NOW], tool_choice=allowed, **GREEDY)
        (call,) = made.output
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("now", {})
        assert made.tool_choice == openai.types.responses.ToolChoiceAllowed(**allowed)
        assert [tool.name for tool in made.tools if tool.type == "function"] == ["weather", "now"]

    runner.run(ask())


def test_the_clients_stream_helper_reads_calls(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        async with client.responses.stream(input="Go?", tools=[WEATHER], tool_choice="required", **GREEDY) as stream:
            kinds = [event.type.removeprefix("response.") async for event in stream]
            final = await stream.get_final_response()
        assert kinds[2] == "output_item.added"
        assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
        assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        (call,) = final.output
        assert call.type == "function_call"
        assert isinstance(call.parsed_arguments, dict)
        assert call.parsed_arguments["place"] in ("sea", "land")

    runner.run(ask())


def test_parse_gives_an_object_of_the_given_class(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        parsed = await client.responses.parse(input="Go?", text_format=Trip, **GREEDY)
        assert isinstance(parsed.output_parsed, Trip)
        assert parsed.text is not None
        assert parsed.text.format is not None
        assert parsed.text.format.type == "json_schema"
        async with client.responses.stream(input="Go?", text_format=Trip, **GREEDY) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == parsed.output_parsed

    runner.run(ask())


def test_an_object_of_any_kind(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        made = await client.responses.create(
            input="Go?", text={"format": {"type": "json_object"}}, model="random", temperature=0, max_output_tokens=40
        )
        assert made.output_text.lstrip().startswith("{")

    runner.run(ask())


def test_a_tool_is_refused_by_its_place(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        wrong: Any = {"type": "function", "name": "f", "parameters": {"type": "array"}}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(input="?", tools=[WEATHER, wrong], **GREEDY)
        assert caught.value.param == "tools[1].parameters"

    runner.run(ask())


def test_a_schema_that_cannot_be_followed_is_refused_by_its_field(
    client: openai.AsyncOpenAI, runner: asyncio.Runner
) -> None:
    async def ask() -> None:
        unknown: Any = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
        with pytest.raises(openai.BadRequestError, match=r"`text\.format`") as caught:
            await client.responses.create(
                input="?", text={"format": {"type": "json_schema", "name": "x", "schema": unknown}}, **GREEDY
            )
        assert caught.value.param == "text.format"

    runner.run(ask())
