"""Tools and formats of answers over HTTP with the openai client: random models, kept in form by the grammar alone."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from in_process import Trunk, served
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from random_mixtral import save_random_mixtral
from tokenizer_forms import sentencepiece_model

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "tomorrow": {"type": "boolean"}},
            "required": ["city", "tomorrow"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
BAD_TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}},
}
ASK: Any = [{"role": "user", "content": "How is the weather?"}]


def random_model(directory: Path, vocab_size: int) -> None:
    save_random_mixtral(
        directory,
        seed=3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab_size,
        num_local_experts=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


class Asked:
    """A random model that is served from another thread, and its openai client."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._trunk = Trunk(directory)
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        self.url = self._started.result(120)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=f"{self.url}/v1", timeout=60, trust_env=False)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        self._trunk.close()

    def chat(self, messages: Any = ASK, **fields: Any) -> ChatCompletion:
        answer: ChatCompletion = self.client.chat.completions.create(
            model="random", messages=messages, **{"temperature": 1, "max_tokens": 200, **fields}
        )
        return answer

    def stream(self, messages: Any = ASK, **fields: Any) -> list[ChatCompletionChunk]:
        stream = self.client.chat.completions.create(
            model="random",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **{"temperature": 1, "max_tokens": 200, **fields},
        )
        return list(stream)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        try:
            async with served(self._directory, [self._trunk.info]) as client:
                self._started.set_result(str(client.base_url))
                await self._end.wait()
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)


@pytest.fixture(scope="module")
def plain(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A template that knows no tools: calls are JSON in the text."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    random_model(directory, json.loads((demo_model / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, directory / name)
    asked = Asked(directory)
    yield asked
    asked.close()


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Mistral's third format: calls begin with a special token."""
    directory = tmp_path_factory.mktemp("mistral") / "model"
    random_model(directory, 32768)
    asked = Asked(sentencepiece_model(directory, "v3"))
    yield asked
    asked.close()


@pytest.fixture(params=["plain", pytest.param("mistral", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Asked:
    asked: Asked = request.getfixturevalue(request.param)
    return asked


def check_call(call: Any) -> None:
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Paris", "Rome")
        assert isinstance(arguments["tomorrow"], bool)
    else:
        assert (call.function.name, arguments) == ("now", {})


# ---- calls


def test_a_required_call_whole_and_streamed(model: Asked) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER, NOW],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        "logprobs": True,
    }

    whole = model.chat(**fields)
    chunks = model.stream(**fields)
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content, choice.message.refusal) == ("tool_calls", None, None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    check_call(call)
    assert whole.usage is not None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert whole.usage.completion_tokens - len(choice.logprobs.content) in (0, 1)  # the end token

    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert not any(delta.content for delta in deltas)
    told = [entry for delta in deltas for entry in delta.tool_calls or ()]
    begun, *pieces = told
    assert (begun.index, begun.type) == (0, "function")
    assert begun.function is not None
    assert (begun.function.name, begun.function.arguments) == (call.function.name, "")  # type: ignore[union-attr]
    assert begun.id
    assert all((piece.id, piece.type, piece.function.name) == (None, None, None) for piece in pieces if piece.function)
    arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
    assert arguments == call.function.arguments  # type: ignore[union-attr]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "tool_calls"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    logprobs = [e for c in chunks[:-1] if c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
    assert [entry.token for entry in logprobs] == [entry.token for entry in choice.logprobs.content]


@pytest.mark.slow
def test_several_calls_and_a_named_one(model: Asked) -> None:
    several = model.chat(tools=[WEATHER, NOW], tool_choice="required", n=8, seed=1, max_tokens=120)
    named = model.chat(tools=[WEATHER, NOW], tool_choice={"type": "function", "function": {"name": "now"}}, n=2)
    counts = []
    for choice in several.choices:
        calls = choice.message.tool_calls or []
        complete = calls if choice.finish_reason == "tool_calls" else calls[:-1]
        for call in complete:
            check_call(call)
        counts.append(len(complete))
        assert len({call.id for call in calls}) == len(calls)
    assert max(counts) > 1
    for choice in named.choices:
        calls = choice.message.tool_calls or []
        assert {call.function.name for call in calls} == {"now"}  # type: ignore[union-attr]


def test_a_conversation_of_five_turns(model: Asked) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *ASK]
    sizes = []
    for turn in range(5):
        choice = "required" if turn % 2 == 0 else "none"
        answer = model.chat(
            messages, tools=[WEATHER, NOW], tool_choice=choice, parallel_tool_calls=False, max_tokens=60
        )
        message = answer.choices[0].message
        assert answer.usage is not None
        sizes.append(answer.usage.prompt_tokens)
        messages.append(message.model_dump(exclude_none=True))
        if turn % 2 == 0:
            assert message.tool_calls
            check_call(message.tool_calls[0])
            messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"degrees": 22}'})
        else:
            assert message.tool_calls is None
            messages.append({"role": "user", "content": "And now?"})
    assert sizes[0] < sizes[2] < sizes[4]
    assert sizes[1] < sizes[3]


def test_auto_leaves_the_choice_to_the_model(model: Asked) -> None:
    answer = model.chat(tools=[WEATHER], max_tokens=12, n=3)
    for choice in answer.choices:
        assert choice.message.tool_calls is None
        assert choice.finish_reason in ("length", "stop")
        assert choice.message.content is not None


@pytest.mark.slow
def test_calls_beside_a_format_of_the_answer(plain: Asked) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = plain.chat(
        tools=[WEATHER], response_format=answer_format, n=8, seed=2, max_tokens=60, parallel_tool_calls=False
    )
    called = [choice for choice in answer.choices if choice.message.tool_calls]
    said = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert called or said
    for choice in said:
        assert json.loads(choice.message.content or "") in ({"ok": True}, {"ok": False})
    for choice in called:
        assert choice.finish_reason == "length" or choice.message.content is None


def test_the_form_before_tools(plain: Asked) -> None:
    functions = [WEATHER["function"]]
    fields: dict[str, Any] = {"functions": functions, "function_call": {"name": "weather"}, "seed": 3}
    whole, chunks = plain.chat(**fields), plain.stream(**fields)
    (choice,) = whole.choices
    assert choice.finish_reason == "function_call"
    call = choice.message.function_call
    assert call is not None
    assert (choice.message.content, choice.message.tool_calls) == (None, None)
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    told = [c.choices[0].delta.function_call for c in chunks[:-1] if c.choices[0].delta.function_call]
    assert "".join(piece.name or "" for piece in told) == "weather"
    assert "".join(piece.arguments or "" for piece in told) == call.arguments
    turns = [choice.message.model_dump(exclude_none=True), {"role": "function", "name": "weather", "content": "22"}]
    plain.chat([*ASK, *turns], functions=functions, function_call="none", max_tokens=2)


# ---- formats


class Answer(BaseModel):
    """What a client wants."""

    colour: Literal["red", "green"]
    sure: bool


def test_structured_outputs_with_pydantic(plain: Asked) -> None:
    parsed = plain.client.chat.completions.parse(
        model="random", messages=ASK, response_format=Answer, max_tokens=100, temperature=1
    )
    message = parsed.choices[0].message
    assert isinstance(message.parsed, Answer)
    assert message.refusal is None


FORMATS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "structured json": ({"structured_outputs": {"json": {"enum": ["a", 5]}}}, lambda t: json.loads(t) in ("a", 5)),
    "structured regex": ({"structured_outputs": {"regex": "[ab]{3}"}}, lambda t: len(t) == 3 and set(t) <= {*"ab"}),
    "structured choice": ({"structured_outputs": {"choice": ["(yes)", "no\n"]}}, lambda t: t in ("(yes)", "no\n")),
    "structured grammar": ({"structured_outputs": {"grammar": 'root ::= "x" | "yy"'}}, lambda t: t in ("x", "yy")),
    "structured tag": (
        {
            "structured_outputs": {
                "structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "z"}}
            }
        },
        lambda t: t == "z",
    ),
    "guided json": ({"guided_json": '{"const": 1}'}, lambda t: t == "1"),
    "guided regex": ({"guided_regex": "[0-9]{2}"}, lambda t: t.isdigit() and len(t) == 2),
    "guided choice": ({"guided_choice": ["only"]}, lambda t: t == "only"),
    "guided grammar": ({"guided_grammar": 'root ::= "q"'}, lambda t: t == "q"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": None}}}}},
        lambda t: json.loads(t) == {"a": None},
    ),
    "tag": (
        {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "z"}}},
        lambda t: t == "z",
    ),
}


def test_every_format_holds_for_both_endpoints(plain: Asked) -> None:
    for name, (fields, fits) in FORMATS.items():
        said = plain.client.completions.create(
            model="random", prompt="Hi", max_tokens=40, temperature=1, extra_body=fields
        )
        for text in (plain.chat(extra_body=fields).choices[0].message.content, said.choices[0].text):
            assert fits(text or ""), (name, text)


# ---- many conversations


def test_a_batch_of_conversations(plain: Asked) -> None:
    others: Any = [{"role": "user", "content": "Hello"}]
    path = "chat/completions/batch"
    response = plain.http.post(path, json={"messages": [ASK, others], "temperature": 0, "max_tokens": 8})
    assert response.status_code == 200, response.text
    batch = response.json()
    assert batch["object"] == "chat.completion"
    assert [choice["index"] for choice in batch["choices"]] == [0, 1]
    for choice, messages in zip(batch["choices"], (ASK, others), strict=True):
        alone = plain.chat(messages, temperature=0, max_tokens=8).choices[0].message.content
        assert choice["message"]["content"] == alone
    wrong = {"messages": [ASK, [*ASK, {"role": "tool", "tool_call_id": "x", "content": ""}]]}
    assert plain.http.post(path, json=wrong).json()["error"]["param"] == "messages[1][1].tool_call_id"
    assert plain.http.post(path, json={"messages": ASK}).json()["error"]["param"] == "messages"


# ---- errors


def test_errors_name_the_field(plain: Asked) -> None:
    bad_schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns: list[Any] = [*ASK, {"role": "assistant", "tool_calls": [call]}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [bad_schema]}, "tools[0].function.parameters"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [NOW], "functions": [{"name": "f"}]}, "functions"),
        ({"messages": turns}, "messages"),
        ({"messages": [*turns, {"role": "tool", "tool_call_id": "d", "content": ""}]}, "messages[2].tool_call_id"),
        ({"messages": [*turns[:1], {**turns[1], "tool_calls": [{**call, "id": 5}]}]}, "messages[1].tool_calls[0].id"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_json": "["}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        # What only the engine can judge:
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "x"}}}, "response_format"),
        ({"structured_outputs": {"json": {"type": "object", "not": {}}}}, "structured_outputs.json"),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools"),
    ]

    for body, param in cases:
        answer = plain.http.post("chat/completions", json={"messages": ASK, "max_tokens": 1, **body})
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"] == param, (body, answer.text)
        assert "Traceback" not in answer.text
