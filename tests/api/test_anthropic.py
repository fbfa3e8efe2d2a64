"""Anthropic's Messages API: its own client and raw HTTP against a real trunk and gateway in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from in_process import Trunk, served_beside

from moe_ray.api.anthropic.parse import parse_messages
from moe_ray.api.anthropic.schemas import MessageAnswer, MessageError, MessageEvent
from moe_ray.api.anthropic.turns import template_messages
from moe_ray.api.service import HttpOptions
from moe_ray.api.sse import SseReader
from moe_ray.errors import ExpertUnavailable, InvalidRequest
from moe_ray.text.tokenizer import Tokenizer

KEYS = ("first-key", "second-key")
HELLO = [{"role": "user", "content": "Hello there, who are you?"}]
ASK: dict[str, Any] = {"model": "random", "max_tokens": 12, "messages": HELLO}
NO_END = {"ignore_eos": True, "temperature": 0}
"""Fields that this server has beside Anthropic's, and one that their client no longer knows."""
END = {"logit_bias": {"2": 100}}


@pytest.fixture(scope="module")
def url(chat_trunk: Trunk, chat_model: Path) -> Iterator[str]:
    options = HttpOptions(api_keys=KEYS, keep_alive_s=60)
    with served_beside(chat_model, [chat_trunk.info], options=options, aliases=["claude-*", "other"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=KEYS[1], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def raw(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"x-api-key": KEYS[0]}, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def unsteady(chat_trunk: Trunk) -> Iterator[Trunk]:
    """The trunk, which a test may slow down or break."""
    yield chat_trunk
    chat_trunk.engine.pause_s, chat_trunk.engine.error = 0.0, None


def events_of(raw: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each carries its name twice."""
    events = [json.loads(data) for data in SseReader().feed(raw)]
    names = [line.removeprefix("event: ") for line in raw.decode().splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    for event in events:
        MessageEvent.model_validate(event, strict=True)
    return events


# ---- answers


def test_an_answer_is_the_one_that_openais_api_gives(client: anthropic.Anthropic, raw: httpx.Client) -> None:
    message = client.messages.create(**ASK, extra_body=NO_END)
    same = raw.post("/v1/chat/completions", headers={"Authorization": f"Bearer {KEYS[0]}"}, json={**ASK, **NO_END})
    [block] = message.content
    assert block.type == "text"
    assert block.text == same.json()["choices"][0]["message"]["content"]
    assert (message.stop_reason, message.stop_sequence, message.role) == ("max_tokens", None, "assistant")
    assert message.usage.output_tokens == 12
    assert message.id.startswith("msg_")
    assert message._request_id is not None


def test_bad_words_are_no_part_of_an_answer(client: anthropic.Anthropic) -> None:
    word = client.messages.create(**ASK, extra_body=NO_END).content[0].text.split()[0]
    without = client.messages.create(**ASK, extra_body={**NO_END, "bad_words": [word]})
    assert word not in without.content[0].text.split()


def test_the_events_of_a_stream_come_in_order_and_are_the_answer(
    client: anthropic.Anthropic, raw: httpx.Client
) -> None:
    whole = client.messages.create(**ASK, extra_body=NO_END)
    response = raw.post("/v1/messages", json={**ASK, **NO_END, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.content)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        *("message_start", "content_block_start", "ping"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert deltas > 3
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert "".join(event["delta"]["text"] for event in events[3 : 3 + deltas]) == whole.content[0].text
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 12
    with client.messages.stream(**ASK, extra_body=NO_END) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == 12
    assert final.stop_reason == "max_tokens"


def test_prompt_tokens_are_counted_once_cached_or_not(client: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "a word, " * 120}]
    asked = {**ASK, "messages": long, "max_tokens": 1}
    counted = client.messages.count_tokens(model="random", messages=long).input_tokens
    first, second = (client.messages.create(**asked).usage for _ in range(2))
    assert first.input_tokens + first.cache_read_input_tokens == counted
    assert second.cache_read_input_tokens > max(first.cache_read_input_tokens, counted // 2)
    assert second.input_tokens + second.cache_read_input_tokens == counted
    with client.messages.stream(**asked) as stream:
        third = stream.get_final_message().usage
    assert (third.input_tokens, third.cache_read_input_tokens) == (
        second.input_tokens,
        second.cache_read_input_tokens,
    )


def test_what_ended_an_answer_is_said(client: anthropic.Anthropic) -> None:
    text = client.messages.create(**ASK, extra_body=NO_END).content[0].text
    stop = text[5:9]
    stopped = client.messages.create(**ASK, stop_sequences=["\u2603", stop], extra_body=NO_END)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text[: text.index(stop)]
    ended = client.messages.create(**ASK, extra_body=END)
    assert (ended.stop_reason, ended.content, ended.usage.output_tokens) == ("end_turn", [], 1)
    with client.messages.stream(**ASK, extra_body=END) as stream:
        assert [event.type for event in stream] == ["message_start", "message_delta", "message_stop"]


def test_an_answer_ends_where_the_context_does_and_a_longer_prompt_is_refused(client: anthropic.Anthropic) -> None:
    nearly = [{"role": "user", "content": "word " * 4050}]
    left = 4096 - client.messages.count_tokens(model="random", messages=nearly).input_tokens
    assert 0 < left < 100
    answer = client.messages.create(model="random", max_tokens=32_000, messages=nearly, extra_body=NO_END)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("model_context_window_exceeded", left)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4095 maximum"):
        client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "word " * 5000}]})


def test_a_last_turn_of_the_assistant_is_continued(client: anthropic.Anthropic, chat_model: Path) -> None:
    turns = [*HELLO, {"role": "assistant", "content": "My name is"}]
    answer = client.messages.create(**{**ASK, "messages": turns}, extra_body=NO_END)
    prompt = Tokenizer(chat_model).apply_chat_template(turns, False, continue_final_message=True)
    assert client.messages.count_tokens(model="random", messages=turns).input_tokens == len(prompt)
    assert answer.content[0].text != client.messages.create(**ASK, extra_body=NO_END).content[0].text


# ---- conversations


def test_turns_become_messages_of_a_chat_template() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": [1, 2]}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    cached = {"cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": [text("gone"), text("!")]}
    turns = [
        {"role": "user", "content": [text("one", **cached), text("two")]},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": [thought, text("I look"), call]},
        {"role": "user", "content": [{**result, **cached}, text("and?")]},
        {"role": "assistant", "content": "Nothing."},
        {"role": "system", "content": "The day is over."},
    ]
    body = {
        "system": [
            text("x-anthropic-billing-header: cc_version=2.1; cch=ab12;"),
            text("Be brief.", **cached),
            text("Be kind."),
        ],
        "messages": turns,
    }
    assert messages_of(body) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "one\ntwo\nthree"},
        {
            "role": "assistant",
            "content": "I look",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": {"at": [1, 2]}}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "look", "content": "Error: gone\n!"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": "The day is over."},
    ]
    assert messages_of({"messages": [{"role": "system", "content": "Be brief."}, *HELLO]}) == [
        {"role": "system", "content": "Be brief."},
        *HELLO,
    ]
    empty = {**result, "content": ""}
    assert messages_of({"messages": [*turns[:3], {"role": "user", "content": [empty]}]})[-1]["content"] == "Error: "
    del empty["content"], empty["is_error"]
    assert messages_of({"messages": [*turns[:3], {"role": "user", "content": [empty]}]})[-1]["content"] == ""


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    request = parse_messages(json.dumps({"model": "m", "max_tokens": 1, **body}).encode())
    return template_messages(request.system, request.messages)


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"max_tokens": 0}, "max_tokens: .* greater than or equal to 1"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages: there is no turn of the user"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0: blocks of type 'image' are not"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
    (
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
        "blocks of type 'document' are not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]},
        "messages.0.content.0.tool_use_id: no `tool_use` block of the turn before waits for a result of 't'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "n", "input": {}}]}]},
        "messages.0.content.0: a `tool_use` block belongs into a turn of the assistant",
    ),
    ({"messages": [*HELLO, {"role": "assistant", "content": []}]}, "must end with text"),
    ({"system": [IMAGE]}, "system.0"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: tools that the server runs"),
    ({"tools": [{"name": "look"}]}, "tools.0.input_schema: Field required"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: there are no `tools`"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: no tool is called 'x'"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name: goes with the type `tool`"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking: this model does not think"),
    ({"temperature": 3}, "`temperature` must be between 0 and 2"),
    ({"top_p": 2}, "`top_p` must be"),
    ({"top_k": -5}, "`top_k` must be"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"logprobs": 3}, "logprobs: this field is not supported"),
    ({"stop": ["x"]}, "stop: this field is not supported"),
    ({"speed": "fast"}, "speed: 'fast' is not supported"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: .* is not supported"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits: "),
    ({"context_management": {"edits": 3}}, "context_management: "),
    ({"context_management": [1]}, "context_management: "),
    ({"allowed_token_ids": []}, "`allowed_token_ids` "),
    ({"nonsense": 1}, "nonsense: this field is not supported"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named(client: anthropic.Anthropic, change: dict[str, Any], said: str) -> None:
    body = {name: value for name, value in {**ASK, **change}.items() if value is not None}
    with pytest.raises(anthropic.BadRequestError, match=said) as caught:
        client.post("/v1/messages", body=body, cast_to=object)
    body_of_error = caught.value.body
    assert isinstance(body_of_error, dict)
    MessageError.model_validate(body_of_error, strict=True)
    assert body_of_error["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id == body_of_error["request_id"]


def test_a_body_that_is_no_json_is_refused(raw: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b'"x"'):
        response = raw.post("/v1/messages", content=body)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_harmless_fields_change_nothing(client: anthropic.Anthropic) -> None:
    plain = client.messages.create(**ASK, extra_body=NO_END)
    harmless = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "thinking": {"type": "disabled"},
        "inference_geo": "us",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "low"},
        "mcp_servers": [],
    }
    same = client.messages.create(**ASK, extra_body={**NO_END, **harmless})
    assert same.content == plain.content
    adaptive = client.messages.create(**ASK, extra_body={**NO_END, "thinking": {"type": "adaptive"}})
    assert adaptive.content == plain.content


# ---- names, keys, failures


def test_a_model_answers_to_all_its_names(client: anthropic.Anthropic, raw: httpx.Client) -> None:
    for name in ("random", "other", "claude-sonnet-9-20990101"):
        assert client.messages.create(**{**ASK, "model": name, "max_tokens": 1}).model == "random"
    with pytest.raises(anthropic.NotFoundError, match="`sonnet-claude-` does not exist") as caught:
        client.messages.create(**{**ASK, "model": "sonnet-claude-"})
    assert caught.value.type == "not_found_error"
    cards = list(client.models.list())
    assert [card.id for card in cards] == ["random", "other"]
    assert cards[0].max_input_tokens == 4096
    assert client.models.retrieve("claude-opus-7").id == "claude-opus-7"
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.models.retrieve("gpt")
    assert unknown.value.type == "not_found_error"
    listed = raw.get("/v1/models").json()
    assert (listed["object"], [card["id"] for card in listed["data"]]) == ("list", ["random", "other"])


def test_keys_are_shown_in_either_header(url: str) -> None:
    for shown in ({"api_key": KEYS[0]}, {"auth_token": KEYS[1]}):
        with anthropic.Anthropic(base_url=url, max_retries=0, **shown) as client:
            client.messages.count_tokens(model="random", messages=HELLO)
    for wrong in ({"api_key": "third"}, {"auth_token": "third"}, {"api_key": f"Bearer {KEYS[0]}"}):
        with (
            anthropic.Anthropic(base_url=url, max_retries=0, **wrong) as client,
            pytest.raises(anthropic.AuthenticationError, match="Incorrect API key") as caught,
        ):
            client.messages.create(**ASK)
        assert caught.value.type == "authentication_error"
    with httpx.Client(base_url=url, trust_env=False) as nobody:
        refused = nobody.post("/v1/messages", json=ASK)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert not any(key in refused.text for key in KEYS)


def test_a_failure_is_a_status_before_the_answer_and_an_event_in_it(
    client: anthropic.Anthropic, unsteady: Trunk
) -> None:
    unsteady.engine.error = ExpertUnavailable("expert 3 of layer 1 at 10.0.0.1:99 is gone")
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(**ASK)
    assert (caught.value.status_code, caught.value.type) == (503, "overloaded_error")
    assert "10.0.0.1" not in str(caught.value)
    assert caught.value.response.headers["retry-after"] == "1"
    unsteady.engine.error = None
    unsteady.engine.pause_s = 0.05

    def read_and_break() -> None:
        with client.messages.stream(**ASK, extra_body=NO_END) as stream:
            for event in stream:
                if event.type == "content_block_delta":
                    unsteady.engine.error = ExpertUnavailable("gone")

    with pytest.raises(anthropic.APIStatusError) as broken:
        read_and_break()
    assert broken.value.type == "overloaded_error"


def test_pings_keep_a_waiting_stream_alive(unsteady: Trunk, chat_model: Path) -> None:
    unsteady.engine.pause_s = 0.4
    asked = {**ASK, "max_tokens": 2}
    impatient = HttpOptions(keep_alive_s=0.1, headers_within_s=0.1)
    with (
        served_beside(chat_model, [unsteady.info], options=impatient) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        response = httpx.post(
            f"{url}/v1/messages", json={**asked, **NO_END, "stream": True}, timeout=60, trust_env=False
        )
        kinds = [event["type"] for event in events_of(response.content)]
        assert kinds[0] == "ping"
        assert kinds.count("ping") >= 4
        with client.messages.stream(**asked, extra_body=NO_END) as stream:
            assert stream.get_final_message().usage.output_tokens == 2


def test_a_client_that_leaves_ends_its_request(client: anthropic.Anthropic, unsteady: Trunk) -> None:
    unsteady.engine.pause_s = 0.02
    with client.messages.stream(**{**ASK, "max_tokens": 4000}, extra_body=NO_END) as stream:
        next(iter(stream.text_stream))
    waited = threading.Event()
    for _ in range(200):
        if not unsteady.runtime.stats().num_running:
            return
        waited.wait(0.05)
    raise AssertionError("still running")


# ---- the description


def test_answers_are_as_the_openapi_says(raw: httpx.Client) -> None:
    MessageAnswer.model_validate(raw.post("/v1/messages", json=ASK).json(), strict=True)
    paths = raw.get("/openapi.json").json()["paths"]
    body = paths["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["required"]) == {"model", "max_tokens", "messages"}
    assert "$ref" not in json.dumps(body)
    answers = paths["/v1/messages"]["post"]["responses"]
    assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessageAnswer")
    assert "text/event-stream" in answers["200"]["content"]
    assert {"400", "401", "404", "429", "503"} <= set(answers)


def test_a_billing_line_alone_is_no_system_text() -> None:
    body = {"system": "x-anthropic-billing-header: cc_version=1;", "messages": HELLO}
    assert messages_of(body) == HELLO
    with pytest.raises(InvalidRequest, match="system"):
        messages_of({"system": 3, "messages": HELLO})
