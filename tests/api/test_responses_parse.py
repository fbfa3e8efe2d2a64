"""Bodies of /v1/responses: what is refused and how, what becomes of items, tools and formats. No model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_ray.api.chat import ToolChoice
from moe_ray.api.job import ModelLimits
from moe_ray.api.responses.conversation import Item, items_of, messages_of
from moe_ray.api.responses.parse import PlannedResponse, chat_of, parse_request, plan_response
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.tokenizer import Tokenizer

CALL = {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"at": {}}}}
NOW = {"type": "function", "name": "now", "description": "The time.", "strict": True}


def parsed(**body: Any) -> Any:
    return parse_request(json.dumps({"input": "Hi", **body}).encode())


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": None}, "input", "`input` is required"),
        ({"input": 5}, "input", "a string or a list"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [5]}, "input", "`input[0]` must be an object"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "`item_reference` is not supported"),
        ({"input": [{"type": "computer_call"}]}, "input", "`computer_call` is not supported"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input", "`input[0].role` 'robot' is not supported"),
        ({"input": [{"role": "user"}]}, "input", "`input[0].content` is required"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "`input[0].content` must be"),
        ({"input": [{"role": "user", "content": []}]}, "input", "`input[0].content`"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            "`input[0].content[0]` of type `input_image` is not supported",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input",
            "`input_file` is not supported",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "input",
            "`input_audio` is not supported",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input",
            "`input[0].content[0].text` is required",
        ),
        ({"input": [CALL, {**OUTPUT, "output": [{"type": "input_image"}]}]}, "input", "`input[1].output[0].type`"),
        ({"tools": [{"type": "web_search"}]}, "tools", "`tools[0].type` 'web_search' is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "`tools[0].name` is required"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "`tools[0].name`"),
        ({"tool_choice": "perhaps"}, "tool_choice", "'perhaps' is not supported"),
        ({"tool_choice": 5}, "tool_choice", "must be `none`, `auto`, `required` or an object"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "`file_search` is not supported"),
        ({"text": {"format": {"type": "grammar"}}}, "text", "`text.format` of type `grammar`"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "`text.format.schema` is required"),
        ({"text": {"verbosity": "high"}}, "text", "`text.verbosity` 'high'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1|equal to 1"),
        ({"max_output_tokens": "5"}, "max_output_tokens", "integer"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"metadata": {"a": 5}}, "metadata", "`metadata.a`"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"truncation": "middle"}, "truncation", "'middle' is not supported"),
        ({"include": ["everything"]}, "include", "'everything' is not supported"),
        ({"service_tier": "flex"}, "service_tier", "'flex' is not supported"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning", "'enormous' is not supported"),
        ({"conversation": "conv_1"}, "conversation", "`conversation` is not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "`prompt` is not supported"),
        ({"context_management": [{}]}, "context_management", "is not supported"),
        ({"max_tokens": 5}, "max_tokens", "use `max_output_tokens`"),
        ({"response_format": {"type": "text"}}, "response_format", "use `text.format`"),
        ({"logprobs": 5}, "logprobs", "`logprobs` is not supported"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids", "is not supported"),
        ({"temprature": 1}, "temprature", "Unknown parameter"),
        ({"stream_options": {}}, "stream_options", "only allowed when `stream`"),
        ({"background": True, "store": False}, "background", "needs `store`"),
        ({"store": "yes"}, "store", "`store`"),
    ],
)
def test_what_is_refused_by_its_name(body: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said.replace("[", r"\[").replace(".", r"\.")) as caught:
        parsed(**body)
    assert caught.value.param is not None
    assert re.split(r"\W", caught.value.param)[0] == param
    assert caught.value.code is not None or param in ("stream_options", "background")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b'{"input": "\xff"}'])
def test_what_is_no_object(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a valid JSON object"):
        parse_request(raw)


def test_null_is_not_given() -> None:
    fields = ("instructions", "tools", "tool_choice", "text", "metadata", "store", "include", "prompt", "top_k", "x")
    body = parsed(**dict.fromkeys(fields))
    assert (body.tools, body.tool_choice, body.store, body.text.format.type) == ([], "auto", None, "text")


# ---- items and messages


def messages(*items: Any, instructions: str | None = None, history: tuple[Item, ...] = ()) -> list[dict[str, Any]]:
    return messages_of(instructions, [*history, *items_of(parsed(input=list(items)))])


def test_items_become_messages() -> None:
    assert messages_of("Be kind.", items_of(parsed(input="Hi"))) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    found = messages(
        {"role": "developer", "content": "Short."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    )
    assert [(each["role"], each["content"]) for each in found] == [
        ("system", "Short."),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("user", "d"),
        ("assistant", "no"),
    ]


def test_calls_and_their_outputs() -> None:
    other = {**CALL, "call_id": "c2", "name": "weather", "arguments": '{"at": "sea"}'}
    found = messages(
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "I look."},
        CALL,
        other,
        {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        OUTPUT,
    )
    assert found[1]["content"] == "I look."
    assert found[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": {"at": "sea"}}},
    ]
    assert found[2:] == [
        {"role": "tool", "tool_call_id": "c2", "name": "weather", "content": "rain"},
        {"role": "tool", "tool_call_id": "c1", "name": "now", "content": "noon"},
    ]
    (_, assistant, _) = messages({"role": "user", "content": "?"}, CALL, {"role": "assistant", "content": "!"}, OUTPUT)
    assert (assistant["content"], len(assistant["tool_calls"])) == ("!", 1)


def test_calls_without_outputs_and_the_reverse() -> None:
    with pytest.raises(InvalidRequest, match="No tool call found for function call output with call_id c1") as caught:
        messages(OUTPUT)
    assert caught.value.param == "input"
    with pytest.raises(InvalidRequest, match="No tool output found for function call c1"):
        messages(CALL)
    with pytest.raises(InvalidRequest, match=r"`input\[0\]\.arguments` must be the JSON text of an object"):
        messages({**CALL, "arguments": "[]"}, OUTPUT)
    cut_off = {**CALL, "arguments": '{"at', "status": "incomplete"}
    assert messages({"role": "user", "content": "?"}, cut_off) == [{"role": "user", "content": "?"}]


def test_items_are_shown_as_they_will_be_listed() -> None:
    given = [{"role": "user", "content": "Hi"}, {**CALL, "id": "fc_mine"}, OUTPUT]
    message, call, output = items_of(parsed(input=given))
    assert message["id"].startswith("msg_")
    assert (message["status"], message["content"]) == ("completed", [{"type": "input_text", "text": "Hi"}])
    assert (call["id"], call["arguments"]) == ("fc_mine", "{}")
    assert output["output"] == "noon"


# ---- tools and formats


def test_tools_and_which_of_them() -> None:
    both = {"tools": [WEATHER, NOW]}
    chat = chat_of(parsed(**both), [])
    weather, now = chat.tools
    assert (weather.name, weather.parameters, weather.strict) == ("weather", WEATHER["parameters"], False)
    assert (now.description, now.parameters["type"], now.strict) == ("The time.", "object", True)
    assert chat.tool_choice == ToolChoice("auto")
    chat = chat_of(parsed(**both, tool_choice="required", parallel_tool_calls=False), [])
    assert chat.tool_choice == ToolChoice("required", parallel=False)
    chat = chat_of(parsed(**both, tool_choice={"type": "function", "name": "now"}), [])
    assert (chat.tool_choice, len(chat.tools)) == (ToolChoice("named", "now"), 2)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    chat = chat_of(parsed(**both, tool_choice=allowed), [])
    assert (chat.tool_choice, [tool.name for tool in chat.tools]) == (ToolChoice("required"), ["now"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "now"}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
    ],
)
def test_tools_that_do_not_fit(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_of(parsed(**body), [])
    assert caught.value.param == param


def test_formats_become_grammars() -> None:
    assert chat_of(parsed(), []).grammar is None
    assert chat_of(parsed(text={"format": {"type": "json_object"}}), []).grammar == Grammar("json_object")
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    given = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    grammar = chat_of(parsed(text={"format": given}), []).grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)) == ("json_schema", schema)


# ---- the prompt


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def planned(tokenizer: Tokenizer, limit: int = 1000, history: Sequence[Item] = (), **body: Any) -> PlannedResponse:
    return plan_response(parsed(**body), history, tokenizer, ModelLimits(tokenizer.vocab_size, limit), "resp_1")


def prompt(tokenizer: Tokenizer, limit: int = 1000, history: Sequence[Item] = (), **body: Any) -> tuple[str, int]:
    """The prompt of a body, and how many tokens it has."""
    token_ids = planned(tokenizer, limit, history, **body).job.choices[0].request.prompt_token_ids
    return tokenizer.decode(token_ids, skip_special_tokens=False), len(token_ids)


def test_history_stands_between_instructions_and_input(tokenizer: Tokenizer) -> None:
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    history = items_of(parsed(input=said))
    text, _ = prompt(tokenizer, history=history, input="three", instructions="zero")
    assert re.findall(r"<\|im_start\|>(\w+)\n(\w+)<", text) == [
        *(("system", "zero"), ("user", "one"), ("assistant", "two"), ("user", "three"))
    ]


def test_first_turns_go_where_truncation_is_auto(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "system", "content": "rules"},
        *({"role": role, "content": f"{i} {role}"} for i in range(4) for role in ("user", "assistant")),
        {"role": "user", "content": "last"},
    ]

    def kept(limit: int, **body: Any) -> list[str]:
        text, _ = prompt(tokenizer, limit, input=turns, truncation="auto", **body)
        assert "rules" in text
        assert text.endswith("last<|im_end|>\n<|im_start|>assistant\n")
        return re.findall(r"user\n(\d) user", text)

    _, whole = prompt(tokenizer, input=turns)
    assert kept(whole + 1) == ["0", "1", "2", "3"]
    assert kept(whole) == ["1", "2", "3"]
    assert kept(whole + 39, max_output_tokens=40) == ["1", "2", "3"]
    _, short = prompt(tokenizer, input=[turns[0], turns[-1]])
    assert kept(short + 1) == []
    for truncation, limit in (("disabled", whole), ("auto", short)):
        with pytest.raises(InvalidRequest, match="maximum context length") as caught:
            prompt(tokenizer, limit, input=turns, truncation=truncation)
        assert caught.value.param == "input"


def test_sampling_is_the_requests(tokenizer: Tokenizer) -> None:
    given = planned(tokenizer, temperature=0, top_k=3, seed=4, stop="x", max_output_tokens=9, top_logprobs=2)
    sampling = given.job.choices[0].request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.stop) == (0, 3, 4, ("x",))
    assert (sampling.logprobs, sampling.max_tokens, given.echo["temperature"]) == (2, 9, 0)
    forbidding = planned(tokenizer, bad_words=["river"]).job.choices[0].request.sampling
    assert tokenizer.decode(forbidding.bad_words_ids[0]).strip() == "river"
    plain = planned(tokenizer).job.choices[0].request
    assert plain.sampling.logprobs is None
    assert plain.sampling.max_tokens == 1000 - len(plain.prompt_token_ids)
    asked = planned(tokenizer, include=["message.output_text.logprobs"]).job.choices[0].request.sampling
    assert asked.logprobs == 0
    with pytest.raises(InvalidRequest) as caught:
        planned(tokenizer, top_p=2)
    assert caught.value.param == "top_p"
