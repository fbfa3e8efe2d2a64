"""OpenAI's schemas, validation and responses, checked with the real client's types; no server, no engine."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from moe_ray import errors
from moe_ray.api.failure import failure_of
from moe_ray.api.generation import ResponseStream, collect
from moe_ray.api.job import MAX_CHOICES, GenerationJob, ModelLimits
from moe_ray.api.openai.chat_render import ChatRenderer
from moe_ray.api.openai.errors import error_body
from moe_ray.api.openai.parse import parse_chat, parse_completion, to_job
from moe_ray.api.openai.render import DONE, CompletionRenderer
from moe_ray.api.openai.schemas import Body, ChatRequest
from moe_ray.api.output import JobOutput
from moe_ray.core import Request, RoutedExperts, TokenEvent, TokenLogprobs
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.trunk.wire import pack_event, pack_request, unpack_event, unpack_request

TEXT_ONLY = {"stop": (), "include_stop_str_in_output": False, "skip_special_tokens": True}
"""What of the sampling parameters stays with the gateway."""
HI = [{"role": "user", "content": "Hi"}]
MAX_LEN = 512


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def chat(**fields: Any) -> Any:
    return parse_chat(json.dumps({"model": "m", "messages": HI, **fields}).encode())


def completion(**fields: Any) -> Any:
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def to_requests(body: Body, tokenizer: Tokenizer, max_model_len: int, job_id: str) -> list[tuple[int, Request]]:
    """The requests of a body's job, by choice index."""
    return to_job(body, tokenizer, ModelLimits(tokenizer.vocab_size, max_model_len), job_id).requests


# ---- requests


def test_defaults(tokenizer: Tokenizer) -> None:
    ((index, request),) = to_requests(completion(), tokenizer, MAX_LEN, "cmpl-1")
    assert (index, request.request_id, list(request.prompt_token_ids)) == (0, "cmpl-1-0", tokenizer.encode("Hi"))
    params = request.sampling
    # The demo model's generation_config.json recommends these two.
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 0.2, 0.9, 0)
    assert params.seed is not None
    assert params.logprobs is None
    ((_, request),) = to_requests(chat(), tokenizer, MAX_LEN, "chatcmpl-1")
    assert list(request.prompt_token_ids) == tokenizer.apply_chat_template(HI)
    assert request.sampling.max_tokens == MAX_LEN - len(request.prompt_token_ids)


def test_without_a_generation_config_openais_defaults_hold(demo_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(demo_model / name, tmp_path)
    bare = Tokenizer(tmp_path)
    ((_, request),) = to_requests(completion(), bare, MAX_LEN, "cmpl-1")
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)


def test_a_request_wins_over_the_generation_config(tokenizer: Tokenizer) -> None:
    ((_, request),) = to_requests(completion(temperature=1.5, top_p=1.0), tokenizer, MAX_LEN, "cmpl-1")
    assert (request.sampling.temperature, request.sampling.top_p) == (1.5, 1.0)


def test_every_parameter_reaches_the_sampler(tokenizer: Tokenizer) -> None:
    given = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "seed": 11,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "return_routed_experts": True,
    }
    more = {"logit_bias": {"5": -100}, "stop": ["a", "b"], "stop_token_ids": [4]}
    for body in (completion(**given, **more, logprobs=3), chat(**given, **more, logprobs=True, top_logprobs=3)):
        ((_, request),) = to_requests(body, tokenizer, MAX_LEN, "r")
        assert {name: getattr(request.sampling, name) for name in given} == given
        at_the_trunk = unpack_request(pack_request(request))
        assert at_the_trunk == replace(request, sampling=replace(request.sampling, **TEXT_ONLY))
        assert request.sampling.logit_bias == {5: -100.0}
        assert request.sampling.stop == ("a", "b")
        assert request.sampling.stop_token_ids == (4,)
        assert request.sampling.logprobs == 3
    assert to_requests(chat(logprobs=True), tokenizer, MAX_LEN, "r")[0][1].sampling.logprobs == 0
    both = chat(max_tokens=5, max_completion_tokens=6)
    assert to_requests(both, tokenizer, MAX_LEN, "r")[0][1].sampling.max_tokens == 6


def test_null_means_default_and_harmless_fields_are_ignored(tokenizer: Tokenizer) -> None:
    nulls = dict.fromkeys(["temperature", "max_tokens", "stop", "n", "seed", "stream", "tools", "ignore_eos", "echo"])
    harmless = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "best_of": 1}
    ((_, request),) = to_requests(completion(**nulls, **harmless), tokenizer, MAX_LEN, "r")
    assert (request.sampling.max_tokens, request.sampling.temperature) == (16, 0.2)
    chat(tool_choice="auto", response_format={"type": "text"}, functions=[], tools=[])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Yo"], ["Hi", "Yo"]),
        ([19556, 28], [[19556, 28]]),
        ([[19556], [28, 5]], [[19556], [28, 5]]),
    ],
)
def test_prompt_forms_and_choice_order(tokenizer: Tokenizer, prompt: Any, expected: list[Any]) -> None:
    pairs = to_requests(completion(prompt=prompt, n=2, seed=2**63 - 1), tokenizer, MAX_LEN, "r")
    assert [index for index, _ in pairs] == list(range(2 * len(expected)))
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in expected]
    assert [list(request.prompt_token_ids) for _, request in pairs] == [p for p in ids for _ in range(2)]
    assert [request.sampling.seed for _, request in pairs] == [2**63 - 1, -(2**63)] * len(expected)
    assert len({request.request_id for _, request in pairs}) == len(pairs)


def test_seeds_are_drawn_when_absent(tokenizer: Tokenizer) -> None:
    seeds = {to_requests(completion(), tokenizer, MAX_LEN, "r")[0][1].sampling.seed for _ in range(8)}
    assert len(seeds) == 8


CHAT_ONLY = {
    "messages": [],
    "top_logprobs": 3,
    "modalities": ["text", "audio"],
    "echo": True,
}
BAD_COMPLETION = {
    "prompt": {"a": 1},
    "n": 0,
    "suffix": "x",
    "best_of": 21,
    "use_beam_search": True,
    "stream_options": {"include_usage": True},
}
BAD_CHAT = CHAT_ONLY | {
    "chat_template": "{{ 1 }}",
}


@pytest.mark.parametrize(("name", "value"), BAD_COMPLETION.items())
def test_refused_by_completions(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match=name) as error:
        completion(**{name: value})
    assert error.value.param == name


@pytest.mark.parametrize(("name", "value"), BAD_CHAT.items())
def test_refused_by_chat(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match=name) as error:
        chat(**{name: value})
    assert error.value.param == name


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"{}", b'{"prompt": NaN}']
)
def test_bodies_that_are_not_requests(body: bytes) -> None:
    for parse in (parse_completion, parse_chat):
        with pytest.raises(errors.InvalidRequest):
            parse(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["Hi", ""]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5]] * (MAX_CHOICES // 2 + 1), "n": 2}, "prompt"),
        ({"prompt": [5] * MAX_LEN, "max_tokens": 1}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"top_k": 2**40}, "top_k"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"temperature": 3}, "temperature"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ""}, "stop"),
    ],
)
def test_refused_by_the_model(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as error:
        to_requests(completion(**fields), tokenizer, MAX_LEN, "r")
    assert error.value.param == param


def test_context_length_message(tokenizer: Tokenizer) -> None:
    with pytest.raises(errors.InvalidRequest) as error:
        to_requests(completion(prompt=[5] * 500, max_tokens=100), tokenizer, MAX_LEN, "r")
    assert str(error.value).startswith(
        "This model's maximum context length is 512 tokens. However, you requested 600 tokens (500 in the prompt, 100"
    )
    long = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(errors.InvalidRequest, match="maximum context length is 512 tokens"):
        to_requests(chat(messages=long), tokenizer, MAX_LEN, "r")


def test_chat_messages(tokenizer: Tokenizer) -> None:
    parts = [{"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    ((_, request),) = to_requests(chat(messages=parts), tokenizer, MAX_LEN, "r")
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert list(request.prompt_token_ids) == tokenizer.apply_chat_template(plain)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(errors.InvalidRequest, match="image_url") as error:
        to_requests(chat(messages=image), tokenizer, MAX_LEN, "r")
    assert error.value.param == "messages"
    for name in ("messages", "add_generation_prompt", "tokenize", "chat_template"):
        with pytest.raises(errors.InvalidRequest, match=name):
            to_requests(chat(chat_template_kwargs={name: 1}), tokenizer, MAX_LEN, "r")


# ---- errors


def test_every_error_has_a_status() -> None:
    expected = {
        errors.InvalidRequest: 400,
        errors.AdapterError: 400,
        errors.AdapterUnavailable: 503,
        errors.ContextLengthExceeded: 400,
        errors.Unauthorized: 401,
        errors.ModelNotFound: 404,
        errors.Forbidden: 403,
        errors.ResponseNotFound: 404,
        errors.RequestTooLarge: 413,
        errors.Overloaded: 429,
        errors.NotReady: 503,
        errors.ExpertUnavailable: 503,
        errors.LinkBroken: 503,
        errors.LinkTimeout: 503,
    }
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 10
    for kind in [*kinds, ValueError]:
        failure = failure_of(kind("the text /etc/secret/key 10.0.0.3:6379"), retry_after_s=7)
        status, body = failure.status, error_body(failure)
        assert status == expected.get(kind, 500)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert failure.headers.get("Retry-After") == ("7" if status in (429, 503) else None)
        if status >= 429:
            assert "secret" not in body["error"]["message"]
            assert "10.0" not in body["error"]["message"]
    assert error_body(failure_of(errors.InvalidRequest("bad", "top_p")))["error"] == {
        "message": "bad",
        "type": "invalid_request_error",
        "param": "top_p",
        "code": None,
    }


def test_a_model_that_does_not_exist() -> None:
    told = error_body(failure_of(errors.ModelNotFound("The model `x` does not exist.")))["error"]
    assert (told["param"], told["code"]) == ("model", "model_not_found")


# ---- responses


class Recorded:
    """Token events that are there already, and which sequences were ended early."""

    def __init__(self, job: GenerationJob, events: list[tuple[int, TokenEvent]]) -> None:
        self.stopped: list[int] = []
        self._live = {index for index, _ in job.requests}
        self._events = deque(events)

    async def next(self, timeout_s: float | None) -> tuple[int, TokenEvent] | None:
        if not self._events:
            raise errors.EngineError("the events ended without a finish reason")
        index, event = self._events.popleft()
        if event.last:
            self._live.discard(index)
        return index, event

    def stop(self, index: int) -> None:
        if index in self._live:
            self._live.remove(index)
            self.stopped.append(index)

    def close(self) -> None:
        for index in sorted(self._live):
            self.stop(index)


def events_of(tokenizer: Tokenizer, text: str, index: int = 0, **last: Any) -> list[tuple[int, TokenEvent]]:
    """One event for each token of `text`, then the end: a stop token, unless `last` says otherwise."""
    eos = min(tokenizer.eos_token_ids)
    end = last or {"token_ids": (eos,), "finish_reason": "stop", "stop_token_id": eos}
    ids = tokenizer.encode(text)
    steps = [TokenEvent("r", (i,), num_cached_tokens=3) for i in ids]
    if "token_ids" not in end:
        *steps, final = steps
        end = {"token_ids": final.token_ids, **end}
    return [(index, event) for event in [*steps, TokenEvent("r", **end)]]


class Run:
    """A response, streamed and whole, from the same events."""

    def __init__(self, body: Body, tokenizer: Tokenizer, events: list[tuple[int, TokenEvent]]) -> None:
        self.stopped: list[int] = []
        """The sequences that were ended early, in the last response."""
        self.job = to_job(body, tokenizer, ModelLimits(tokenizer.vocab_size, MAX_LEN), "id-1")
        self.requests = self.job.requests
        self._tokenizer, self._events = tokenizer, events
        self._kind = ChatRenderer if isinstance(body, ChatRequest) else CompletionRenderer

    def response(self) -> tuple[ResponseStream, Recorded]:
        """The response as a stream that is not open yet, and where its events come from."""
        job = replace(self.job, stream=True)
        output, source = JobOutput.of(job, self._tokenizer), Recorded(job, self._events)
        renderer = self._kind(output, tokenizer=self._tokenizer, model="m", created=7)
        return ResponseStream(output, source, renderer, keep_alive_s=10), source

    def stream(self) -> list[dict[str, Any]]:
        """The JSON of each event before [DONE]."""

        async def read() -> str:
            response, source = self.response()
            self.stopped = source.stopped
            await response.open(within_s=10)
            return "".join([text async for text in response.body()])

        raw = asyncio.run(read())
        assert raw.endswith(DONE)
        lines = raw.removesuffix(DONE).split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: {") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def full(self) -> dict[str, Any]:
        job = replace(self.job, stream=False)
        output, source = JobOutput.of(job, self._tokenizer), Recorded(job, self._events)
        self.stopped = source.stopped
        asyncio.run(collect(output, source))
        renderer = self._kind(output, tokenizer=self._tokenizer, model="m", created=7)
        return json.loads(json.dumps(renderer.whole(), allow_nan=False))


TEXT = 'Paris is "nice" \\ 中文 😀\n'


def test_chat_whole_and_streamed(tokenizer: Tokenizer) -> None:
    run = Run(chat(stream=True, stream_options={"include_usage": True}), tokenizer, events_of(tokenizer, TEXT))
    full = run.full()
    ChatCompletion.model_validate(full)
    choice = full["choices"][0]
    assert (full["id"], full["object"], full["created"], full["model"]) == ("id-1", "chat.completion", 7, "m")
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    prompt, tokens = len(run.requests[0][1].prompt_token_ids), len(tokenizer.encode(TEXT)) + 1
    assert full["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }

    chunks = run.stream()
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert not any("role" in delta for delta in deltas[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], full["usage"])
    assert run.stopped == []


def test_no_usage_unless_asked_and_continuous_when_asked(tokenizer: Tokenizer) -> None:
    events = events_of(tokenizer, "a b c")
    assert all("usage" not in chunk for chunk in Run(chat(stream=True), tokenizer, events).stream())
    body = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in Run(body, tokenizer, events).stream()]
    assert counts == [1, 1, 2, 3, 4, 4]


def test_completion_whole_and_streamed_for_two_choices_of_two_prompts(tokenizer: Tokenizer) -> None:
    texts = ["one", "two 中", "three", "four"]
    each = [events_of(tokenizer, text, i) for i, text in enumerate(texts)]
    mixed = [event for step in itertools.zip_longest(*each) for event in step if event is not None]
    run = Run(completion(prompt=["Hi", "Yo there"], n=2, stream=True), tokenizer, mixed)
    full = run.full()
    Completion.model_validate(full)
    assert [choice["text"] for choice in full["choices"]] == texts
    prompts = len(tokenizer.encode("Hi")) + len(tokenizer.encode("Yo there"))
    assert full["usage"]["prompt_tokens"] == prompts
    assert full["usage"]["completion_tokens"] == len(mixed)
    assert full["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    chunks = run.stream()
    for i, text in enumerate(texts):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own][-1] == "stop"
    Completion.model_validate(chunks[-1])


def test_echo(tokenizer: Tokenizer) -> None:
    events = events_of(tokenizer, " there")
    for prompt in ("Hi", tokenizer.encode("Hi")):
        run = Run(completion(prompt=prompt, echo=True, stream=True), tokenizer, events)
        assert run.full()["choices"][0]["text"] == "Hi there"
        assert "".join(chunk["choices"][0]["text"] for chunk in run.stream()) == "Hi there"


def test_length_and_stop_token(tokenizer: Tokenizer) -> None:
    run = Run(chat(stream=True), tokenizer, events_of(tokenizer, "cut 🦙", finish_reason="length"))
    assert run.full()["choices"][0]["finish_reason"] == "length"
    assert run.full()["choices"][0]["message"]["content"] == "cut 🦙"
    end = tokenizer.encode("X")[0]
    ids = (*tokenizer.encode("abc"), end)
    event = TokenEvent("r", ids, finish_reason="stop", stop_token_id=end)
    run = Run(chat(stop_token_ids=[end]), tokenizer, [(0, event)])
    full = run.full()
    assert full["choices"][0]["message"]["content"] == "abc"
    assert (full["choices"][0]["stop_reason"], full["usage"]["completion_tokens"]) == (end, len(ids))
    kept = Run(chat(stop_token_ids=[end], include_stop_str_in_output=True), tokenizer, [(0, event)])
    assert kept.full()["choices"][0]["message"]["content"] == "abcX"


def test_stop_string_ends_the_choice_and_stops_the_engine(tokenizer: Tokenizer) -> None:
    first = events_of(tokenizer, "one END two three four")
    second = events_of(tokenizer, "no stop word here", 1)
    mixed = [event for step in itertools.zip_longest(first, second) for event in step if event is not None]
    run = Run(chat(stop="END", n=2, stream=True), tokenizer, mixed)
    full = run.full()
    assert run.stopped == [0]
    assert [choice["message"]["content"] for choice in full["choices"]] == ["one ", "no stop word here"]
    assert [choice["stop_reason"] for choice in full["choices"]] == ["END", None]
    assert full["usage"]["completion_tokens"] < len(first) + len(second) - 2
    chunks = run.stream()
    assert run.stopped == [0]
    content = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == 0]
    assert "".join(content) == "one "


def test_error_before_the_first_chunk_is_raised(tokenizer: Tokenizer) -> None:
    run = Run(chat(stream=True), tokenizer, [(0, TokenEvent("r", error=errors.NotReady("no trunk")))])
    with pytest.raises(errors.NotReady):
        run.stream()
    with pytest.raises(errors.NotReady):
        run.full()
    assert run.stopped == []


@pytest.mark.parametrize(
    ("error", "kind"), [(errors.ExpertUnavailable("layer 3"), "service_unavailable_error"), (None, "server_error")]
)
def test_error_in_mid_stream_is_an_event_before_done(tokenizer: Tokenizer, error: Exception | None, kind: str) -> None:
    events = [(0, TokenEvent("r", (19556,))), (1, TokenEvent("r", (19556,)))]
    if error is not None:
        events.append((1, TokenEvent("r", error=error)))
    run = Run(chat(stream=True, n=2, stream_options={"include_usage": True}), tokenizer, events)
    last = run.stream()[-1]
    assert last["error"]["type"] == kind
    assert run.stopped == ([0] if error is not None else [0, 1])  # the other choice must not run on


def test_closing_the_stream_stops_the_engine(tokenizer: Tokenizer) -> None:
    response, source = Run(chat(stream=True, n=2), tokenizer, events_of(tokenizer, "a b c")).response()

    async def leave() -> None:
        await response.open(within_s=10)
        body = response.body()
        await anext(body)
        await body.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert source.stopped == [0, 1]


def with_logprobs(tokenizer: Tokenizer, text: str) -> list[tuple[int, TokenEvent]]:
    eos = min(tokenizer.eos_token_ids)
    ids = [*tokenizer.encode(text), eos]
    other = tokenizer.encode("Z")[0]
    return [
        (
            0,
            TokenEvent(
                "r",
                (i,),
                (TokenLogprobs(i, -0.5, ((i, -0.5), (other, float("-inf")))),),
                finish_reason="stop" if i == eos else None,
                stop_token_id=eos if i == eos else None,
            ),
        )
        for i in ids
    ]


def test_chat_logprobs(tokenizer: Tokenizer) -> None:
    text = "Hi 🦙 中"
    run = Run(chat(logprobs=True, top_logprobs=2, stream=True), tokenizer, with_logprobs(tokenizer, text))
    full = run.full()
    ChatCompletion.model_validate(full)
    content = full["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == text
    assert content[0]["top_logprobs"][1] == {"token": "Z", "logprob": -9999.0, "bytes": [90]}
    chunks = run.stream()
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    streamed = [entry for c in chunks for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    plain = Run(chat(logprobs=True), tokenizer, with_logprobs(tokenizer, text)).full()
    assert plain["choices"][0]["logprobs"]["content"][0] == {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}, content[0]["top_logprobs"][1]],
    }


def test_completion_logprobs(tokenizer: Tokenizer) -> None:
    text = "Hi 🦙 there 中!"
    run = Run(completion(logprobs=2, stream=True), tokenizer, with_logprobs(tokenizer, text))
    full = run.full()
    Completion.model_validate(full)
    logprobs = full["choices"][0]["logprobs"]
    ids = tokenizer.encode(text)
    assert len(logprobs["tokens"]) == len(ids)
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert logprobs["top_logprobs"][0] == {"Hi": -0.5, "Z": -9999.0}
    parts = [c["choices"][0]["logprobs"] for c in run.stream() if c["choices"][0]["logprobs"]]
    for name in logprobs:
        assert [value for part in parts for value in part[name]] == logprobs[name]


def test_degraded_positions_are_told(tokenizer: Tokenizer) -> None:
    events = [
        TokenEvent("r", (19556,), degraded_positions=(0, 4)),
        TokenEvent("r", (28,)),
        TokenEvent("r", (19556,), finish_reason="length", degraded_positions=(6,)),
    ]
    assert [unpack_event(pack_event(event)) for event in events] == events
    whole = Run(chat(), tokenizer, [(0, event) for event in events])
    assert whole.full()["choices"][0]["degraded_positions"] == [0, 4, 6]
    streamed = Run(chat(stream=True), tokenizer, [(0, event) for event in events])
    told = [c["degraded_positions"] for e in streamed.stream() for c in e["choices"] if "degraded_positions" in c]
    assert told == [[0, 4, 6]], "once, with the finish reason"
    healthy = Run(chat(), tokenizer, [(0, TokenEvent("r", (19556,), finish_reason="length"))])
    assert "degraded_positions" not in healthy.full()["choices"][0]


def routed(start: int, positions: int) -> RoutedExperts:
    """Experts that say which position, layer and place they are of: 100 position + 10 layer + k; two layers, top 2."""
    numbers = [
        100 * p + 10 * layer + k for p in range(start, start + positions) for layer in range(2) for k in range(2)
    ]
    return RoutedExperts(start, (positions, 2, 2), b"".join(n.to_bytes(2, "little") for n in numbers))


def decoded(told: str) -> list[list[list[int]]]:
    """As users of vLLM read it."""
    return np.load(io.BytesIO(base64.b64decode(told)), allow_pickle=False).tolist()


def cells(start: int, end: int) -> list[list[list[int]]]:
    return [[[100 * p + 10 * layer + k for k in range(2)] for layer in range(2)] for p in range(start, end)]


@pytest.mark.parametrize("make", [chat, completion])
def test_routed_experts_are_told_by_position(tokenizer: Tokenizer, make: Any) -> None:
    body = make(return_routed_experts=True, stop="zzz", max_tokens=9)
    prompt = len(to_requests(body, tokenizer, MAX_LEN, "r")[0][1].prompt_token_ids)
    (z,) = tokenizer.encode("z")
    events = [
        TokenEvent("r", (19556,), routed_experts=routed(0, prompt)),
        TokenEvent("r", (z,), routed_experts=routed(prompt, 1)),  # held back: it may be the stop string
        TokenEvent("r", (28,), routed_experts=routed(0, prompt + 2)),  # replayed on another trunk
        TokenEvent("r", (19556, 28), routed_experts=routed(prompt + 2, 2)),
        TokenEvent("r", (19556,), finish_reason="length", routed_experts=routed(prompt + 4, 1)),
    ]
    assert [unpack_event(pack_event(event)) for event in events] == events
    run = Run(body, tokenizer, [(0, event) for event in events])
    whole = run.full()
    (Completion if make is completion else ChatCompletion).model_validate(whole)
    assert decoded(whole["choices"][0]["routed_experts"]) == cells(0, prompt + 5)
    assert prompt + 5 == whole["usage"]["total_tokens"] - 1
    chunks = [c for e in run.stream() for c in e["choices"]]
    told = [(c["routed_experts_start"], decoded(c["routed_experts"])) for c in chunks if "routed_experts" in c]
    bounds = [0, prompt, prompt + 2, prompt + 4, prompt + 5]
    assert told == [(a, cells(a, b)) for a, b in itertools.pairwise(bounds)]
    silent = Run(make(), tokenizer, [(0, replace(event, routed_experts=None)) for event in events])
    assert "routed_experts" not in json.dumps(silent.full()) + json.dumps(silent.stream())


def test_positions_behind_a_stop_string_are_not_told(tokenizer: Tokenizer) -> None:
    body = completion(return_routed_experts=True, stop=",")
    (request,) = [request for _, request in to_requests(body, tokenizer, MAX_LEN, "r")]
    prompt, tokens = len(request.prompt_token_ids), tuple(tokenizer.encode("Hi, there Hi"))
    assert len(tokens) == 4
    events = [(0, TokenEvent("r", tokens, finish_reason="length", routed_experts=routed(0, prompt + 3)))]
    run = Run(body, tokenizer, events)
    assert decoded(run.full()["choices"][0]["routed_experts"]) == cells(0, prompt + 1)
    (last,) = [c for e in run.stream() for c in e["choices"]]
    assert (last["finish_reason"], last["routed_experts_start"]) == ("stop", 0)
    assert decoded(last["routed_experts"]) == cells(0, prompt + 1)


def test_experts_of_too_many_positions_are_refused(tokenizer: Tokenizer) -> None:
    body = completion(prompt=[5, 6, 7], n=100, max_tokens=3000, return_routed_experts=True)
    with pytest.raises(errors.InvalidRequest, match="300300 positions in all choices is too much: at most 262144"):
        to_requests(body, tokenizer, 4096, "r")
    assert len(to_requests(body.model_copy(update={"n": 80}), tokenizer, 4096, "r")) == 80
    assert len(to_requests(body.model_copy(update={"return_routed_experts": False}), tokenizer, 4096, "r")) == 100


def test_a_trunk_that_leaves_a_position_out_is_an_error(tokenizer: Tokenizer) -> None:
    body = completion(return_routed_experts=True)
    run = Run(body, tokenizer, [(0, TokenEvent("r", (28,), finish_reason="length", routed_experts=routed(1, 2)))])
    with pytest.raises(errors.ProtocolError):
        run.full()
