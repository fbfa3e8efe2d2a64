"""Conversations with tools: token for token mistral_common's, and in words for templates that know no tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool as MistralTool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizer_forms import sentencepiece_model, tekken, write_json

from moe_ray.errors import InvalidRequest
from moe_ray.text.answers.tools import Tool
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.tool_turns import check_tool_turns

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Ort für das Wetter"}}}
WEATHER, NOW = Tool("weather", "Says the weather", SCHEMA), Tool("now")
USER, SYSTEM = {"role": "user", "content": "How is it in Zürich?"}, {"role": "system", "content": "Be brief."}
Turn = dict[str, Any]


def calling(*calls: tuple[str, str, dict[str, Any]], content: str = "") -> Turn:
    """An assistant's turn with calls: (id, name, arguments)."""
    told = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": told}


def result(call_id: str, content: str) -> Turn:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


ONE = calling(("abcdefgh1", "weather", {"city": "Zürich", "n": [1, 2.5, None]}))
TWO = calling(("abcdefgh1", "weather", {"city": "Zürich"}), ("abcdefgh2", "now", {}))
CHATS: dict[str, list[Turn]] = {
    "first question": [USER],
    "system and turns": [SYSTEM, USER, {"role": "assistant", "content": "Hm."}, USER],
    "one result": [USER, ONE, result("abcdefgh1", '{"degrees":  22}')],
    "answered": [USER, ONE, result("abcdefgh1", "sunny"), {"role": "assistant", "content": "Sunny."}, USER],
    "two results": [SYSTEM, USER, TWO, result("abcdefgh1", "22"), result("abcdefgh2", "noon")],
    "results out of order": [USER, TWO, result("abcdefgh2", "noon"), result("abcdefgh1", '"rain"')],
    "called twice": [
        USER,
        ONE,
        result("abcdefgh1", "22"),
        calling(("abcdefgh9", "now", {})),
        result("abcdefgh9", "12"),
    ],
}
FORMS: dict[str, tuple[Callable[[Path], Path], Callable[[], MistralTokenizer] | None]] = {
    "v3": (lambda d: sentencepiece_model(d, "v3"), MistralTokenizer.v3),
    "v7": (lambda d: sentencepiece_model(d, "v7"), MistralTokenizer.v7),
    **{f"tekken {v}": (lambda d, v=v: tekken(d, v, size=4000), None) for v in ("v7", "v11", "v13")},  # type: ignore[misc]
}


@pytest.fixture(scope="module", params=FORMS)
def form(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, MistralTokenizer]:
    write, make = FORMS[request.param]
    directory = write(tmp_path_factory.mktemp("form"))
    theirs = MistralTokenizer.from_file(str(directory / "tekken.json")) if make is None else make()
    return Tokenizer(directory), theirs


def their_message(turn: Turn) -> Any:
    match turn["role"]:
        case "user":
            return UserMessage(content=turn["content"])
        case "system":
            return SystemMessage(content=turn["content"])
        case "tool":
            return ToolMessage(content=turn["content"], tool_call_id=turn["tool_call_id"])
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", ())
    ]
    return AssistantMessage(content=turn["content"] or None, tool_calls=calls or None)  # type: ignore[arg-type]


def test_tools_have_the_ids_of_mistral_common(form: tuple[Tokenizer, MistralTokenizer]) -> None:
    tokenizer, theirs = form
    tools = [MistralTool.from_openai(tool.described()) for tool in (WEATHER, NOW)]
    for name, chat in CHATS.items():
        check_tool_turns(chat)
        request = ChatCompletionRequest(messages=[their_message(turn) for turn in chat], tools=tools)
        expected = theirs.encode_chat_completion(request).tokens
        assert tokenizer.apply_chat_template(chat, tools=(WEATHER, NOW)) == expected, name


def test_ids_of_other_apis_are_made_short_for_mistral(form: tuple[Tokenizer, MistralTokenizer]) -> None:
    tokenizer, _ = form
    chat = [USER, calling(("call_9-12", "now", {})), result("call_9-12", "noon")]
    text = tokenizer.render_chat(chat)
    assert "call_9" not in text
    assert text == tokenizer.render_chat(chat)


HERMES = (
    "{% if tools %}{{ '<|im_start|>system\nCall as <tool_call>JSON</tool_call>: ' ~ (tools | tojson) }}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
    "{% for c in m.tool_calls or () %}{{ '<tool_call>\n' ~ (c.function | tojson) ~ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_a_template_that_knows_tools_is_given_them(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(demo_model / "tokenizer.json")
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": HERMES})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.chat_template.knows_tools
    text = tokenizer.render_chat(CHATS["one result"], tools=[WEATHER])
    assert json.loads(text.partition(": ")[2].partition("<|im_end|>")[0]) == [WEATHER.described()]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "n": [1, 2.5, null]}}' in text
    assert '<|im_start|>tool\n{"degrees":  22}<|im_end|>' in text
    assert "Call as" not in tokenizer.render_chat(CHATS["one result"])
    # Another format than the template's: moe_ray tells the model of it, in words.
    other = Tokenizer(tmp_path, "llama3_json")
    text = other.render_chat([USER], tools=[WEATHER])
    assert "Call as" not in text
    assert '{"name": "function_name", "parameters": {"argument_name": "value"}}' in text


def test_a_template_that_knows_no_tools_is_told_in_words(demo_model: Path) -> None:
    smol = Tokenizer(demo_model)
    assert not smol.chat_template.knows_tools
    text = smol.render_chat([SYSTEM, *CHATS["results out of order"], USER], tools=[WEATHER, NOW])
    system, user, call, answer, end = text.removesuffix("\n").split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions.")
    assert [json.loads(line) for line in system.splitlines() if line.startswith('{"name": "') and "desc" in line] == [
        WEATHER.described()["function"],
        NOW.described()["function"],
    ]
    assert '\n{"name": "function_name", "arguments": {"argument_name": "value"}}\n' in system
    assert user == f"<|im_start|>user\n{USER['content']}"
    assert call == (
        '<|im_start|>assistant\n{"name": "weather", "arguments": {"city": "Zürich"}}\n{"name": "now", "arguments": {}}'
    )
    assert answer == f'<|im_start|>user\nResult of weather: "rain"\nResult of now: noon\n{USER["content"]}'
    assert end == "<|im_start|>assistant"


def test_turns_still_alternate_for_mixtrals_first_format(tmp_path: Path) -> None:
    mixtral = Tokenizer(sentencepiece_model(tmp_path))
    for chat in CHATS.values():
        text = mixtral.render_chat(chat, tools=[NOW])
        assert text.startswith("<s>[INST] ")
        assert text.count("You may call functions") == 1
    assert "You may" not in mixtral.render_chat(CHATS["one result"])


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        ([USER, ONE], "messages"),
        ([USER, ONE, USER], "messages[2]"),
        ([USER, TWO, result("abcdefgh1", "x"), USER], "messages[3]"),
        ([USER, result("abcdefgh1", "x")], "messages[1].tool_call_id"),
        ([USER, ONE, result("abcdefgh2", "x")], "messages[2].tool_call_id"),
        ([USER, ONE, {"role": "tool", "content": "x"}], "messages[2].tool_call_id"),
        ([USER, ONE, result("abcdefgh1", "x"), result("abcdefgh1", "x")], "messages[3].tool_call_id"),
        ([USER, calling(("a", "now", {}), ("a", "now", {}))], "messages[1].tool_calls"),
        ([USER, calling(("", "now", {}))], "messages[1].tool_calls[0].id"),
        ([USER, calling(("a", "n w", {}))], "messages[1].tool_calls[0].function.name"),
        ([USER, calling(("a", "now", "{}"))], "messages[1].tool_calls[0].function.arguments"),  # type: ignore[arg-type]
        ([{**ONE, "role": "user"}], "messages[0].tool_calls"),
    ],
)
def test_calls_and_results_that_do_not_fit(chat: list[Turn], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_tool_turns(chat)
    assert error.value.param == param
    assert param in str(error.value)
