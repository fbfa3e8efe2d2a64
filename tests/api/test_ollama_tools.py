"""Tools and formats over ollama's API, with its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ollama
import pytest
from in_process import Trunk, served_beside

HELLO = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def client(chat_trunk: Trunk, chat_model: Path) -> Iterator[ollama.Client]:
    with (
        served_beside(chat_model, [chat_trunk.info]) as url,
        ollama.Client(url, timeout=60, trust_env=False) as client,
    ):
        yield client


def test_a_format_is_kept(client: ollama.Client) -> None:
    options = {"num_predict": 100, "seed": 1}
    for text in (
        client.chat("random", HELLO, format=SCHEMA, options=options).message.content,
        client.generate("random", "x", format=SCHEMA, options=options).response,
        "".join(
            line.response or "" for line in client.generate("random", "x", format=SCHEMA, stream=True, options=options)
        ),
    ):
        jsonschema.validate(json.loads(text or ""), SCHEMA)
    with pytest.raises(ollama.ResponseError, match="`format`"):
        client.chat("random", HELLO, format={"$ref": "#/nowhere"}, options=options)
    cut = client.chat("random", HELLO, format="json", options={"num_predict": 12, "temperature": 0})
    assert (cut.message.content or "").lstrip().startswith("{")


def test_a_call_is_told_in_one_line_and_its_result_goes_on(client: ollama.Client) -> None:
    """The answer is "no" or a call: of some seeds a random model calls."""
    asked: dict[str, Any] = {"tools": [TOOL], "format": {"const": "no"}}
    for seed in range(30):
        options = {"seed": seed, "num_predict": 200, "temperature": 1.5}
        whole = client.chat("random", HELLO, options=options, **asked)
        if whole.message.tool_calls and whole.done_reason == "stop":
            break
    else:
        raise AssertionError("no call in 30 answers")
    calls = whole.message.tool_calls
    assert {call.function.name for call in calls} == {"clock"}
    lines = list(client.chat("random", HELLO, options=options, stream=True, **asked))
    told = [call for line in lines for call in line.message.tool_calls or ()]
    assert [call.function for call in told] == [call.function for call in calls]
    assert sum(bool(line.message.tool_calls) for line in lines) == len(calls)
    assert (lines[-1].done, lines[-1].done_reason, lines[-1].message.content) == (True, "stop", "")
    results = [{"role": "tool", "content": "noon", "tool_name": "clock"} for _ in calls]
    after = client.chat("random", [*HELLO, whole.message, *results], options={"num_predict": 4}, tools=[TOOL])
    assert (after.prompt_eval_count or 0) > (whole.prompt_eval_count or 0)
    with pytest.raises(ollama.ResponseError, match="no call of the assistant waits"):
        client.chat("random", [*HELLO, whole.message, *results, results[0]])


def test_what_can_be_called_is_shown(client: ollama.Client) -> None:
    assert client.show("random").capabilities == ["completion", "tools"]
