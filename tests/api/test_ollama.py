"""Ollama's API: its own client and raw HTTP against a real trunk and gateway in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from in_process import Trunk, served_beside

from moe_ray import __version__
from moe_ray.api.ollama.history import template_messages
from moe_ray.api.ollama.schemas import (
    OllamaAnswer,
    OllamaGenerated,
    OllamaMessage,
    OllamaModels,
    OllamaShown,
    OllamaVersion,
)
from moe_ray.api.service import HttpOptions
from moe_ray.errors import ExpertUnavailable, InvalidRequest
from moe_ray.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello there, who are you?"}]
FEW = {"num_predict": 8, "temperature": 0}


@pytest.fixture(scope="module")
def url(chat_trunk: Trunk, chat_model: Path) -> Iterator[str]:
    options = HttpOptions(keep_alive_s=0.1, headers_within_s=0.1)
    with served_beside(chat_model, [chat_trunk.info], options=options, aliases=["mixtral:8x7b"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[ollama.Client]:
    with ollama.Client(url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def raw(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def unsteady(chat_trunk: Trunk) -> Iterator[Trunk]:
    """The trunk, which a test may slow down or break."""
    yield chat_trunk
    chat_trunk.engine.pause_s, chat_trunk.engine.error = 0.0, None


def openai_text(raw: httpx.Client, messages: Any, **more: Any) -> str:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **more}
    text: str = raw.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


# ---- answers


def test_a_chat_is_answered_as_by_openais_api(client: ollama.Client, raw: httpx.Client) -> None:
    expected = openai_text(raw, HELLO)
    whole = client.chat("random", HELLO, options=FEW)
    assert (whole.message.role, whole.message.content) == ("assistant", expected)
    assert (whole.done, whole.done_reason, whole.eval_count, whole.model) == (True, "length", 8, "random")
    lines = list(client.chat("random:latest", HELLO, options=FEW, stream=True))
    assert "".join(line.message.content or "" for line in lines) == expected
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 4
    assert lines[-1].prompt_eval_count == whole.prompt_eval_count
    assert client.chat("random", messages=[]).done_reason == "load"


def test_a_prompt_is_answered_as_the_turn_of_a_user(client: ollama.Client, raw: httpx.Client) -> None:
    said = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = openai_text(raw, said)
    whole = client.generate("random", HELLO[0]["content"], system="Be brief.", options=FEW)
    assert whole.response == expected
    lines = list(client.generate("random", HELLO[0]["content"], system="Be brief.", options=FEW, stream=True))
    assert "".join(line.response or "" for line in lines) == expected
    assert lines[-1].context == whole.context
    completion = {"prompt": "One, two,", "max_tokens": 8, "temperature": 0}
    plain = raw.post("/v1/completions", json=completion).json()["choices"][0]["text"]
    assert client.generate("random", "One, two,", raw=True, options=FEW).response == plain
    for empty in (client.generate("random"), client.generate("random", "", keep_alive="10m")):
        assert (empty.response, empty.done, empty.done_reason) == ("", True, "load")


def test_a_context_goes_on_with_the_very_tokens_of_the_conversation(
    client: ollama.Client, raw: httpx.Client, chat_model: Path
) -> None:
    tokenizer = Tokenizer(chat_model)
    first = client.generate("random", "Name a river.", options=FEW)
    assert first.context is not None
    turns = [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": first.response},
        {"role": "user", "content": "Another."},
    ]
    answer = tokenizer.encode(first.response or "", add_special_tokens=False)
    again = client.generate("random", "Another.", context=first.context, options=FEW)
    assert again.context is not None
    if first.context[-len(answer) :] == answer:  # the model's tokens are the ones that the tokenizer makes of the text
        assert again.context[: again.prompt_eval_count] == tokenizer.apply_chat_template(turns)
    assert again.context[: len(first.context)] == first.context
    assert tokenizer.decode(again.context[: again.prompt_eval_count], False) == tokenizer.render_chat(turns)
    with_system = client.generate("random", "Another.", system="Be brief.", context=first.context, options=FEW)
    assert "Be brief.\n\nAnother." in tokenizer.decode(with_system.context or [])


def test_a_stop_string_is_no_part_of_the_answer_or_of_its_context(client: ollama.Client, chat_model: Path) -> None:
    text = client.generate("random", "Name a river.", options=FEW).response or ""
    stop = text[6:9]
    stopped = client.generate("random", "Name a river.", options={**FEW, "stop": ["\u2603", stop]})
    assert (stopped.response, stopped.done_reason) == (text[: text.index(stop)], "stop")
    assert Tokenizer(chat_model).decode(stopped.context or []).endswith(stopped.response or "?")
    *_, last = client.generate("random", "Name a river.", options={**FEW, "stop": stop}, stream=True)
    assert last.context == stopped.context


def test_durations_are_measured(client: ollama.Client, unsteady: Trunk) -> None:
    unsteady.engine.pause_s = 0.1
    answer = client.chat("random", HELLO, options={"num_predict": 4})
    second = 1_000_000_000
    assert answer.eval_count == 4
    assert 0.1 * second <= (answer.prompt_eval_duration or 0)
    assert 0.3 * second <= (answer.eval_duration or 0)
    parts = (answer.load_duration or 0) + (answer.prompt_eval_duration or 0) + (answer.eval_duration or 0)
    assert (answer.load_duration or -1) >= 0
    assert parts <= (answer.total_duration or 0)


def test_options_are_sampling_parameters(client: ollama.Client, raw: httpx.Client) -> None:
    options = {
        "seed": 7,
        "temperature": 1.5,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "num_predict": 8,
    }
    ours = {name: value for name, value in options.items() if name != "num_predict"}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    expected = openai_text(raw, HELLO, **ours, **penalties, repetition_penalty=1.3)
    asked = {**options, **penalties, "repeat_penalty": 1.3, "repeat_last_n": -1, "num_ctx": 2048, "num_thread": 2}
    assert client.chat("random", HELLO, options=asked).message.content == expected
    off = client.chat("random", HELLO, options={**FEW, "repeat_penalty": 1.9, "repeat_last_n": 0})
    assert off.message.content == openai_text(raw, HELLO)
    prompt = client.chat("random", HELLO, options=FEW).prompt_eval_count or 0
    for num_predict in (-1, -2):
        full = client.chat("random", HELLO, options={**FEW, "num_predict": num_predict, "num_ctx": prompt + 5})
        assert (full.eval_count, full.done_reason) == (5, "length")


def test_log_probabilities_come_with_their_text(client: ollama.Client) -> None:
    whole = client.chat("random", HELLO, options=FEW, logprobs=True, top_logprobs=2)
    told = list(client.chat("random", HELLO, options=FEW, logprobs=True, top_logprobs=2, stream=True))
    streamed = [each for line in told for each in line.logprobs or ()]
    assert streamed == list(whole.logprobs or ())
    assert len(streamed) == 8
    assert all(len(each.top_logprobs or ()) == 2 for each in streamed)
    assert "".join(each.token for each in streamed) == whole.message.content
    assert client.generate("random", "x", options=FEW, logprobs=True).logprobs


# ---- what the model is


def test_the_model_is_listed_under_all_its_names(client: ollama.Client, raw: httpx.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == ["random:latest", "mixtral:8x7b"]
    one = models[0]
    assert one.details is not None
    assert (one.details.family, one.details.format, one.details.quantization_level) == ("mixtral", "safetensors", "F32")
    assert one.digest is not None
    assert len(one.digest) == 64
    assert one.size is not None
    assert one.size > 6_000_000 * 4
    loaded = client.ps().models
    assert [(model.name, model.context_length) for model in loaded] == [("random:latest", 4096), ("mixtral:8x7b", 4096)]
    for path in ("/api/tags", "/api/ps"):
        OllamaModels.model_validate(raw.get(path).json(), strict=True)
    assert client.generate("mixtral:8x7b", "x", options=FEW).model == "mixtral:8x7b"


def test_what_the_model_is_can_be_shown(client: ollama.Client, raw: httpx.Client, chat_model: Path) -> None:
    shown = client.show("random")
    config = json.loads((chat_model / "config.json").read_text())
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "mixtral"
    assert shown.modelinfo["mixtral.context_length"] == 4096
    assert shown.modelinfo["mixtral.expert_count"] == config["num_local_experts"]
    assert shown.template == (chat_model / "chat_template.jinja").read_text()
    assert "completion" in (shown.capabilities or [])
    weights = sum(each.stat().st_size for each in chat_model.glob("*.safetensors"))
    assert abs(weights - 4 * int(shown.modelinfo["general.parameter_count"])) < 50_000, "float32, and a header"
    OllamaShown.model_validate(raw.post("/api/show", json={"name": "random"}).json(), strict=True)
    version = raw.get("/api/version").json()
    OllamaVersion.model_validate(version, strict=True)
    assert version["moe_ray"] == __version__
    assert raw.head("/").status_code == 200


def test_nothing_but_the_served_model_is_managed(client: ollama.Client, raw: httpx.Client) -> None:
    assert client.pull("random").status == "success"
    assert [step.status for step in client.pull("random", stream=True)] == ["success"]
    for act in (
        lambda: client.pull("llama3"),
        lambda: client.show("llama3"),
        lambda: client.generate("llama3", "x"),
        lambda: list(client.chat("llama3", HELLO, stream=True)),
    ):
        with pytest.raises(ollama.ResponseError, match="`llama3` does not exist") as missing:
            act()
        assert missing.value.status_code == 404
    for act, said in (
        (lambda: client.delete("random"), "deletes no models"),
        (lambda: client.copy("random", "other"), "--served-model-name"),
        (lambda: client.create("other", from_="random"), "makes no models"),
        (lambda: client.push("random"), "uploads no models"),
        (lambda: client.embed("random", "x"), "does not support embeddings"),
        (lambda: client.embeddings("random", "x"), "does not support embeddings"),
    ):
        with pytest.raises(ollama.ResponseError, match=said) as refused:
            act()
        assert refused.value.status_code == 400
    assert raw.get("/api/nothing").json() == {"error": "no route GET /api/nothing"}


# ---- what is wrong

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {"suffix": "x"}, "suffix: a suffix is not supported"),
    ("generate", {"images": ["AAAA"]}, "images: images are not supported"),
    ("generate", {"template": "{{ .Prompt }}"}, "template: another template is not supported"),
    ("generate", {"raw": True, "system": "x"}, "raw: the prompt is the whole text"),
    ("generate", {"prompt": "", "keep_alive": 0}, "keep_alive: this server does not unload"),
    ("generate", {"think": True}, "think: 'random' does not support thinking"),
    ("generate", {"format": "xml"}, "format"),
    ("generate", {"nonsense": 1}, "nonsense: this field is not supported"),
    ("generate", {"context": [99_999_999]}, "holds token id 99999999"),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, "images are not supported"),
    ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: no call of the assistant waits"),
    ("chat", {"messages": [*HELLO, {"role": "assistant", "content": ""}]}, "would be continued, but is empty"),
    ("chat", {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    ("chat", {"options": {"nonsense": 1}}, "options.nonsense: there is no such option"),
    ("chat", {"options": {"mirostat": 2}}, "options.mirostat: 2 is not supported"),
    ("chat", {"options": {"num_predict": 0}}, "options.num_predict: must be -1, -2 or at least 1"),
    (
        "chat",
        {"options": {"num_ctx": 99_999}},
        r"options.num_ctx: 99999 tokens are more than this server takes \(4096\)",
    ),
    ("chat", {"options": {"num_ctx": 4}}, "maximum context length is 4 tokens"),
    ("chat", {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
    ("chat", {"options": {"temperature": 9}}, "`temperature` must be between 0 and 2"),
    ("chat", {"logprobs": True, "top_logprobs": 99}, "top_logprobs: must be between 0 and 20"),
]


@pytest.mark.parametrize(("path", "change", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named(raw: httpx.Client, path: str, change: dict[str, Any], said: str) -> None:
    asked = {"prompt": "x"} if path == "generate" else {"messages": HELLO}
    response = raw.post(f"/api/{path}", json={"model": "random", **asked, **change})
    assert response.status_code == 400, response.text
    [(field, message)] = response.json().items()
    assert field == "error"
    assert re.search(said, message), message


def test_a_failure_is_a_status_before_the_answer_and_a_line_in_it(client: ollama.Client, unsteady: Trunk) -> None:
    unsteady.engine.error = ExpertUnavailable("gone")
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("random", HELLO)
    assert caught.value.status_code == 503
    unsteady.engine.error = None
    unsteady.engine.pause_s = 0.05

    def read_and_break() -> None:
        for _ in client.chat("random", HELLO, stream=True, options={"num_predict": 100}):
            unsteady.engine.error = ExpertUnavailable("gone")

    with pytest.raises(ollama.ResponseError, match="gone"):
        read_and_break()


def test_a_waiting_stream_says_nothing_in_the_form_of_an_answer(
    client: ollama.Client, raw: httpx.Client, unsteady: Trunk
) -> None:
    unsteady.engine.pause_s = 0.4
    body = {"model": "random", "messages": HELLO, "options": {"num_predict": 2}}
    response = raw.post("/api/chat", json=body)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    for line in lines:
        OllamaAnswer.model_validate(line, strict=True)
    assert [line["message"]["content"] for line in lines[:3]] == ["", "", ""]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert list(client.generate("random", "x", options={"num_predict": 2}, stream=True))[-1].eval_count == 2


def test_answers_are_as_the_openapi_says(raw: httpx.Client) -> None:
    body = {"model": "random", "stream": False, "logprobs": True, "top_logprobs": 1, "options": FEW}
    OllamaGenerated.model_validate(raw.post("/api/generate", json={**body, "prompt": "x"}).json(), strict=True)
    OllamaAnswer.model_validate(raw.post("/api/chat", json={**body, "messages": HELLO}).json(), strict=True)
    paths = raw.get("/openapi.json").json()["paths"]
    for path in ("/api/generate", "/api/chat", "/api/show"):
        assert paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["type"] == "object"
    assert "application/x-ndjson" in paths["/api/chat"]["post"]["responses"]["200"]["content"]


# ---- tools


def test_calls_and_results_find_each_other() -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"n": 1}}, **more}

    turns = [
        {"role": "user", "content": "x", "images": None},
        {"role": "assistant", "tool_calls": [call("a"), call("b", id="own")], "thinking": "hm"},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of a"},
    ]
    a = {"id": "call_0", "type": "function", "function": {"name": "a", "arguments": {"n": 1}}}
    b = {**a, "id": "own", "function": {"name": "b", "arguments": {"n": 1}}}
    assert template_messages([OllamaMessage.model_validate(turn) for turn in turns]) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [a, b]},
        {"role": "tool", "content": "of b", "tool_call_id": "own", "name": "b"},
        {"role": "tool", "content": "of a", "tool_call_id": "call_0", "name": "a"},
    ]
    for wrong in ({"tool_name": "c"}, {"tool_call_id": "other"}):
        bad = [*turns[:2], {"role": "tool", "content": "x", **wrong}]
        with pytest.raises(InvalidRequest, match="no call of the assistant waits"):
            template_messages([OllamaMessage.model_validate(turn) for turn in bad])
