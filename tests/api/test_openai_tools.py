"""Tools in OpenAI's chat API without a server: what is asked of the engine, and answers whole and streamed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_openai import HI, MAX_LEN, Run, chat, completion, events_of, with_logprobs
from tokenizer_forms import sentencepiece_model

from moe_ray.api.chat import ChatInput, Tool, chat_prompt
from moe_ray.api.job import ModelLimits, make_job
from moe_ray.api.openai.chat_render import ChatRenderer, FunctionRenderer
from moe_ray.api.openai.parse import to_job
from moe_ray.api.output import JobOutput
from moe_ray.core import SamplingParams, TokenEvent
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.tokenizer import Tokenizer

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
STRICT = {"type": "function", "function": {"name": "now", "strict": True}}
CALL = '{"name": "weather", "arguments": {"city": "Zürich 😀"}}'
ARGUMENTS = '{"city": "Zürich 😀"}'


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def grammar(tokenizer: Tokenizer, **fields: Any) -> Grammar | None:
    """What the engine is to hold the answer to."""
    job = to_job(chat(**fields), tokenizer, ModelLimits(tokenizer.vocab_size, MAX_LEN), "id")
    return job.choices[0].request.sampling.grammar


def test_what_the_engine_is_asked_to_hold_to(tokenizer: Tokenizer) -> None:
    assert grammar(tokenizer, tools=[WEATHER]) is None  # the demo model's calls have no marker
    assert grammar(tokenizer, tools=[WEATHER, STRICT], tool_choice="none") is None
    must = grammar(tokenizer, tools=[WEATHER, STRICT], tool_choice="required")
    named = grammar(tokenizer, tools=[WEATHER, STRICT], tool_choice={"type": "function", "function": {"name": "now"}})
    strict = grammar(tokenizer, tools=[WEATHER, STRICT])
    for each, in_it, not_in_it in (
        (must, ["weather", "now", '"city"'], ["triggers"]),
        (named, ["now"], ["weather"]),
        (strict, ["weather", "now", "triggers"], ['"city"']),  # only strict schemas bind a model that may choose
    ):
        assert each is not None
        assert each.kind == "structural_tag"
        assert json.loads(each.source)["format"]
        assert all(text in each.source for text in in_it)
        assert not any(text in each.source for text in not_in_it)
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "not": {}}}}
    loose = grammar(tokenizer, tools=[odd], tool_choice="required")
    assert loose is not None
    assert '"not"' not in loose.source  # cannot be held to, and the function is not strict
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 5}}}
    assert grammar(tokenizer, response_format=schema) == Grammar("json_schema", '{"const": 5}')
    both = grammar(tokenizer, response_format=schema, tools=[WEATHER])
    assert both is not None
    assert {"const": 5} in [each.get("json_schema") for each in json.loads(both.source)["format"]["elements"]]
    job = to_job(completion(guided_regex="a+"), tokenizer, ModelLimits(tokenizer.vocab_size, MAX_LEN), "id")
    assert job.choices[0].request.sampling.grammar == Grammar("regex", "a+")


def test_an_answer_of_text_and_calls_whole_and_streamed(tokenizer: Tokenizer) -> None:
    text = f'Let me see.\n{CALL}\n{{"name": "now", "arguments": {{}}}}'
    body = chat(tools=[WEATHER, STRICT], stream=True, stream_options={"include_usage": True})
    run = Run(body, tokenizer, events_of(tokenizer, text))
    full = run.full()
    ChatCompletion.model_validate(full)
    (choice,) = full["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"], choice["message"]["refusal"]) == ("Let me see.", None)
    calls = choice["message"]["tool_calls"]
    assert [(c["type"], c["function"]) for c in calls] == [
        ("function", {"name": "weather", "arguments": ARGUMENTS}),
        ("function", {"name": "now", "arguments": "{}"}),
    ]
    assert full["usage"]["completion_tokens"] == len(tokenizer.encode(text)) + 1

    *chunks, usage = run.stream()
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert usage["usage"] == full["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    entries = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(each) == 1 for each in entries)
    by_call = {k: list(g) for k, g in itertools.groupby((e[0] for e in entries), key=lambda e: e["index"])}
    assert list(by_call) == [0, 1]
    for (begun, *pieces), name, arguments in zip(by_call.values(), ("weather", "now"), (ARGUMENTS, "{}"), strict=True):
        assert begun["function"] == {"name": name, "arguments": ""}
        assert begun["type"] == "function"
        assert all(set(piece) == {"index", "function"} for piece in pieces)
        assert "".join(piece["function"]["arguments"] for piece in pieces) == arguments
    assert len(by_call[0]) > 3  # arguments came as they were written
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_an_answer_of_calls_alone_has_no_content(tokenizer: Tokenizer) -> None:
    run = Run(chat(tools=[WEATHER], logprobs=True), tokenizer, with_logprobs(tokenizer, CALL))
    (choice,) = run.full()["choices"]
    assert choice["message"]["content"] is None
    assert len(choice["logprobs"]["content"]) == len(tokenizer.encode(CALL))
    told = [entry for chunk in run.stream() for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert told == choice["logprobs"]["content"]


def test_a_call_that_is_cut_ends_with_length(tokenizer: Tokenizer) -> None:
    cut = CALL[:-6]
    run = Run(chat(tools=[WEATHER]), tokenizer, events_of(tokenizer, cut, finish_reason="length"))
    (choice,) = run.full()["choices"]
    assert choice["finish_reason"] == "length"
    assert ARGUMENTS.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


def test_no_call_is_read_where_none_may_be(tokenizer: Tokenizer) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [STRICT]}):
        (choice,) = Run(chat(**fields), tokenizer, events_of(tokenizer, CALL)).full()["choices"]
        assert (choice["message"], choice["finish_reason"]) == (
            {"role": "assistant", "content": CALL, "refusal": None},
            "stop",
        )


def test_special_tokens_that_are_markers_are_seen(tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_model(tmp_path, "v3"))
    prompt = chat_prompt(ChatInput(HI, (Tool("now"),)), tokenizer)
    assert prompt.grammar is not None
    job = make_job(
        "id", [prompt], SamplingParams(), ModelLimits(tokenizer.vocab_size, MAX_LEN), prompt_field="messages"
    )
    output = JobOutput.of(job, tokenizer)
    ids = tokenizer.encode('Yes.[TOOL_CALLS] [{"name": "now", "arguments": {}}]', False)
    assert tokenizer.special_tokens["[TOOL_CALLS]"] in ids
    for token_id in [*ids, 2]:
        last = token_id == 2
        output.take(
            0, TokenEvent("r", (token_id,), finish_reason="stop" if last else None, stop_token_id=2 if last else None)
        )
    answer = output.choices[0].answer
    assert answer.content.strip() == "Yes."
    assert [(call.name, call.arguments, len(call.call_id)) for call in answer.calls] == [("now", "{}", 9)]


def test_functions_are_answered_as_functions(tokenizer: Tokenizer) -> None:
    assert ChatRenderer.for_body(chat(tools=[WEATHER])) is ChatRenderer
    assert ChatRenderer.for_body(chat(functions=[WEATHER["function"]])) is FunctionRenderer


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"tool_calls": {"id": "a"}}, "messages[1].tool_calls"),
        ({"tool_calls": ["x"]}, "messages[1].tool_calls[0]"),
        ({"tool_calls": [{"id": "a", "type": "custom"}]}, "messages[1].tool_calls[0].type"),
        ({"tool_calls": [{"id": "a"}]}, "messages[1].tool_calls[0].function"),
        ({"tool_calls": [{"id": "a", "function": {"name": ""}}]}, "messages[1].tool_calls[0].function.name"),
        (
            {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"function_call": {"name": "f", "arguments": "x"}}, "messages[1].function_call.arguments"),
        ({"function_call": {"name": "f"}, "tool_calls": [{}]}, "messages[1]"),
        (
            {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[" * 10_000}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_calls_in_messages_that_are_wrong(tokenizer: Tokenizer, message: dict[str, Any], param: str) -> None:
    body = chat(messages=[*HI, {"role": "assistant", **message}])
    with pytest.raises(InvalidRequest) as error:
        to_job(body, tokenizer, ModelLimits(tokenizer.vocab_size, MAX_LEN), "id")
    assert error.value.param == param
    assert param in str(error.value)
