"""The HTTP API over the real thing: gateway, trunk, eight expert actors, asked with httpx and the openai client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from served import Served

from moe_ray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reference import Reference

GREEDY: dict[str, Any] = {"temperature": 0}
QUESTIONS = ["What is the capital of France?", "Name three rivers in Europe.", "Who wrote Romeo and Juliet?"]
TOPICS = ["the sea", "the moon", "bread", "rain", "trees", "a cat", "music", "snow"]


@pytest.fixture(scope="module")
def http(served_demo: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served_demo.url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(served_demo: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served_demo.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tokenizer(served_demo: Served) -> Tokenizer:
    return Tokenizer(served_demo.config.model.path)


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def events(response: httpx.Response) -> list[str]:
    """The data of each server-sent event, the wire format checked."""
    assert response.status_code == 200, response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    raw = response.read().decode()
    assert raw.endswith("\n\n")
    blocks = raw[:-2].split("\n\n")
    blocks = [block for block in blocks if block != ": keep-alive"]
    assert all(block.startswith("data: ") and len(block.splitlines()) == 1 for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def sse(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        *chunks, last = events(response)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def complete(http: httpx.Client, prompt: object, **options: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": prompt, **options})
    assert response.status_code == 200, response.text
    return response.json()


def trunk_status(served: Served) -> dict[str, Any]:
    from ray import serve

    (status,) = serve.get_deployment_handle("Trunk", served.app_name).broadcast("status").results(timeout_s=10)
    return status


def wait_idle(served: Served, timeout_s: float) -> dict[str, Any]:
    """The trunk's status once nothing runs or waits in it."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = trunk_status(served)
        if status["num_running"] == status["num_waiting"] == 0:
            return status
        assert time.monotonic() < deadline, f"{status['num_running']} sequences still run"
        time.sleep(0.05)


# ---- plain routes and refusals


def test_health(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_models(http: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "moe_ray"
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 8192
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/v1/nothing", None, 404, None),
        ("GET", "/v1/chat/completions", None, 405, None),
        ("DELETE", "/v1/models", None, 405, None),
        ("POST", "/v1/completions", b"{", 400, None),
        ("POST", "/v1/completions", b"[]", 400, None),
        ("POST", "/v1/completions", b"\xff\xfe", 400, None),
        ("POST", "/v1/completions", {}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": []}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": "x", "model": "gpt-5"}, 404, "model"),
        ("POST", "/v1/completions", {"prompt": "x", "temperature": 3}, 400, "temperature"),
        ("POST", "/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ("POST", "/v1/completions", {"prompt": "x", "seed": 2**63}, 400, "seed"),
        ("POST", "/v1/chat/completions", {"messages": messages("x"), "max_tokens": 0}, 400, "max_tokens"),
        ("POST", "/v1/completions", {"prompt": "x", "n": 0}, 400, "n"),
        ("POST", "/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
        ("POST", "/v1/completions", {"prompt": "x", "logprobs": 99}, 400, "logprobs"),
        ("POST", "/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages"),
        ("POST", "/v1/chat/completions", {"messages": messages("x"), "top_logprobs": 2}, 400, "top_logprobs"),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": messages("x"), "tools": [{"type": "function"}]},
            400,
            "tools[0].function",
        ),
    ],
)
def test_refusals_have_openais_shape(
    http: httpx.Client, method: str, path: str, body: object, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    response = http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens") as caught:
        client.completions.create(model="demo", prompt=[5] * 8192, max_tokens=1, stream=stream)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match=r"requested 8200 tokens \(100 in the prompt, 8100 in the"):
        client.completions.create(model="demo", prompt=[5] * 100, max_tokens=8100, stream=stream)


# ---- greedy text is transformers'


@pytest.mark.parametrize("question", QUESTIONS)
def test_chat_equals_transformers(
    client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer, demo_reference: Reference, question: str
) -> None:
    prompt = tokenizer.apply_chat_template(messages(question))
    whole = client.chat.completions.create(model="demo", messages=messages(question), max_tokens=24, **GREEDY)
    (choice,) = whole.choices
    guess = tokenizer.encode(choice.message.content or "", add_special_tokens=False)
    expected = demo_reference.greedy(prompt, 24, guess)
    text = tokenizer.decode(expected)
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    ended = expected[-1] in tokenizer.eos_token_ids
    assert choice.finish_reason == ("stop" if ended else "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(expected))

    chunks = sse(http, "/v1/chat/completions", {"messages": messages(question), "max_tokens": 24, **GREEDY})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == choice.finish_reason
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(chunks) > 5  # it did stream


def test_completions_equal_transformers(
    client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer, demo_reference: Reference
) -> None:
    prompts = ["Once upon a time", "def fibonacci(n):"]
    whole = client.completions.create(model="demo", prompt=prompts, max_tokens=16, **GREEDY)
    guesses = [tokenizer.encode(choice.text, add_special_tokens=False) for choice in whole.choices]
    greedy = [demo_reference.greedy(tokenizer.encode(p), 16, guess) for p, guess in zip(prompts, guesses, strict=True)]
    expected = [tokenizer.decode(tokens) for tokens in greedy]
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.object == "text_completion"
    texts = ["", ""]
    for chunk in sse(http, "/v1/completions", {"prompt": prompts, "max_tokens": 16, **GREEDY}):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == expected
    echoed = complete(http, prompts[0], max_tokens=4, echo=True, **GREEDY)["choices"][0]["text"]
    assert echoed.startswith(prompts[0])


# ---- what a stream carries


def test_usage_comes_last_and_only_when_asked(client: openai.OpenAI, http: httpx.Client) -> None:
    asked = {"prompt": "Rain is", "max_tokens": 6, "ignore_eos": True, **GREEDY}
    chunks = sse(http, "/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert all("usage" not in chunk for chunk in sse(http, "/v1/completions", asked))
    refused = http.post("/v1/completions", json={**asked, "stream_options": {"include_usage": True}})
    assert refused.json()["error"]["param"] == "stream_options"


def test_max_tokens(client: openai.OpenAI) -> None:
    for limit in (1, 5):
        body = client.completions.create(
            model="demo", prompt="One two three", max_tokens=limit, extra_body={"ignore_eos": True}, **GREEDY
        )
        assert body.choices[0].finish_reason == "length"
        assert body.usage is not None
        assert body.usage.completion_tokens == limit


def test_a_character_of_many_tokens_streams_whole(http: httpx.Client, tokenizer: Tokenizer) -> None:
    asked = {"prompt": "😀🎉日本語🦊" * 6, "max_tokens": 24, "ignore_eos": True, **GREEDY}
    whole = complete(http, **asked)["choices"][0]["text"]
    assert any(len(tokenizer.encode(character)) > 1 for character in whole if ord(character) > 0x2FFF)
    pieces = [chunk["choices"][0]["text"] for chunk in sse(http, "/v1/completions", asked)]
    assert "".join(pieces) == whole
    assert "\ufffd" not in whole[:-1]  # the last character may be cut by max_tokens


def test_a_long_prompt_is_not_silent(http: httpx.Client) -> None:
    """Through Serve's proxy: headers and a comment are there while the prompt is computed, where that takes longer."""
    prompt = [5 + i % 400 for i in range(1500)]
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    sent = time.monotonic()
    with http.stream("POST", "/v1/completions", json=asked) as response:
        arrived = [(time.monotonic(), piece) for piece in response.iter_raw()]
    assert response.status_code == 200
    first, _ = arrived[0]
    token = next(at for at, piece in arrived if b"data: {" in piece)
    if token - sent > 2:
        assert arrived[0][1].startswith(b": keep-alive\n\n")
        assert token - first > 0.5
    assert arrived[-1][1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("fields", [{"seed": -1}, {"top_p": 0}, {"temperature": 2, "top_p": 0, "seed": -(2**63)}])
def test_what_openais_schema_allows_is_taken(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": messages("Say hi."), "max_tokens": 4, **GREEDY}
    greedy = http.post("/v1/chat/completions", json=body)
    response = http.post("/v1/chat/completions", json={**body, **fields})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"] == greedy.json()["choices"][0]["message"]


# ---- stop strings


@pytest.mark.parametrize("stop", ["ital of Fr", "e", ["nowhere", "is Par"], "The"])
def test_stop_strings_cut_inside_tokens_and_across_chunks(http: httpx.Client, stop: str | list[str]) -> None:
    asked = {"messages": messages(QUESTIONS[0]), "max_tokens": 32, **GREEDY}
    full = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert full.startswith("The capital of France is Paris")
    found = [s for s in ([stop] if isinstance(stop, str) else stop) if s in full]
    expected = full[: full.index(found[0])]
    choice = http.post("/v1/chat/completions", json={**asked, "stop": stop}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    assert choice["stop_reason"] == found[0]
    chunks = sse(http, "/v1/chat/completions", {**asked, "stop": stop})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


# ---- log-probabilities


def test_completion_logprobs_are_transformers(
    client: openai.OpenAI, tokenizer: Tokenizer, demo_reference: Reference
) -> None:
    prompt = tokenizer.encode("The capital of France is")
    tokens = demo_reference.greedy(prompt, 4)
    expected = demo_reference.logprobs(prompt + tokens)[len(prompt) - 1 : -1]
    choice = client.completions.create(model="demo", prompt=prompt, max_tokens=4, logprobs=3, **GREEDY).choices[0]
    got = choice.logprobs
    assert got is not None
    assert got.tokens == [tokenizer.decode([token]) for token in tokens]
    assert got.token_logprobs == pytest.approx(
        [float(row[t]) for row, t in zip(expected, tokens, strict=True)], abs=1e-3
    )
    assert got.top_logprobs is not None
    for row, top in zip(expected, got.top_logprobs, strict=True):
        likely = row.topk(3)
        names = [tokenizer.decode([i]) for i in likely.indices.tolist()]
        assert dict(top) == pytest.approx(dict(zip(names, likely.values.tolist(), strict=True)), abs=1e-3)
    assert got.text_offset == [len("".join(got.tokens[:i])) for i in range(4)]


def test_chat_logprobs_are_transformers(client: openai.OpenAI, tokenizer: Tokenizer, demo_reference: Reference) -> None:
    prompt = tokenizer.apply_chat_template(messages(QUESTIONS[0]))
    tokens = demo_reference.greedy(prompt, 24)[:4]
    expected = demo_reference.logprobs(prompt + tokens)[len(prompt) - 1 : -1]
    choice = client.chat.completions.create(
        model="demo", messages=messages(QUESTIONS[0]), max_tokens=4, logprobs=True, top_logprobs=2, **GREEDY
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 4
    for row, token, entry in zip(expected, tokens, choice.logprobs.content, strict=True):
        assert bytes(entry.bytes or []) == tokenizer.token_bytes(token)
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        likely = row.topk(2)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likely.values.tolist(), abs=1e-3)
        assert [bytes(t.bytes or []) for t in entry.top_logprobs] == [
            tokenizer.token_bytes(i) for i in likely.indices.tolist()
        ]


# ---- sampling


def test_n_choices_with_a_seed(http: httpx.Client) -> None:
    asked = {"prompt": "My favourite animal is", "max_tokens": 12, "temperature": 1.0, "seed": 5}
    three = [choice["text"] for choice in complete(http, n=3, **asked)["choices"]]
    assert len(set(three)) == 3
    assert three == [choice["text"] for choice in complete(http, n=3, **asked)["choices"]]
    assert complete(http, **asked)["choices"][0]["text"] == three[0]
    texts = ["", "", ""]
    for chunk in sse(http, "/v1/completions", {**asked, "n": 3}):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == three


def test_a_seed_gives_the_same_text_alone_and_under_load(http: httpx.Client) -> None:
    asked = {
        "prompt": "The inventor opened the door and",
        "max_tokens": 24,
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": 3,
    }
    alone = complete(http, **asked)["choices"][0]["text"]
    other = complete(http, **{**asked, "seed": 4})["choices"][0]["text"]
    assert other != alone
    load = {"prompt": [f"Chapter {i}:" for i in range(12)], "max_tokens": 40, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**load, "stream": True}) as busy:
        next(busy.iter_lines())  # they run
        assert complete(http, **asked)["choices"][0]["text"] == alone
    unseeded = {**asked, "seed": None, "temperature": 1.5}
    assert complete(http, **unseeded)["choices"][0]["text"] != complete(http, **unseeded)["choices"][0]["text"]


def test_sixteen_streams_at_once_equal_each_alone(served_demo: Served, client: openai.OpenAI) -> None:
    questions = [f"{ask} {topic}." for topic in TOPICS for ask in ("Describe", "Write a poem about")]

    def options(question: str) -> dict[str, Any]:
        return {"model": "demo", "messages": messages(question), "max_tokens": 12, **GREEDY}

    alone = [client.chat.completions.create(**options(q)).choices[0].message.content for q in questions]

    async def stream(together: openai.AsyncOpenAI, question: str) -> tuple[str, float, float]:
        text, first = "", 0.0
        async for chunk in await together.chat.completions.create(**options(question), stream=True):
            text += chunk.choices[0].delta.content or ""
            first = first or time.monotonic()
        return text, first, time.monotonic()

    async def everybody() -> list[tuple[str, float, float]]:
        async with openai.AsyncOpenAI(base_url=f"{served_demo.url}/v1", api_key="none", max_retries=0) as together:
            return await asyncio.gather(*(stream(together, question) for question in questions))

    streamed = asyncio.run(everybody())
    assert len(set(alone)) > 8
    assert [text for text, _, _ in streamed] == alone
    assert max(first for _, first, _ in streamed) < min(last for _, _, last in streamed)  # all ran side by side


# ---- clients that leave, and too many of them


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_leaves_frees_its_sequences(served_demo: Served, http: httpx.Client, stream: bool) -> None:
    before = wait_idle(served_demo, 30)
    body = {"prompt": ["A long story:", "Another:"], "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    began = threading.Event()

    def leave() -> None:
        with httpx.Client(base_url=served_demo.url, timeout=60 if stream else 2, trust_env=False) as leaving:
            if stream:
                with leaving.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
                    began.set()
                    time.sleep(1)
            else:
                began.set()
                with pytest.raises(httpx.ReadTimeout):
                    leaving.post("/v1/completions", json=body)

    thread = threading.Thread(target=leave)
    thread.start()
    assert began.wait(30)
    deadline = time.monotonic() + 20
    while trunk_status(served_demo)["num_running"] != 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    thread.join(30)
    after = wait_idle(served_demo, 10)
    assert after["kv_blocks_free"] == before["kv_blocks_free"]
    assert after["generated_tokens"] - before["generated_tokens"] < 4000
    assert http.get("/health").status_code == 200


def test_over_the_bound_is_429_with_retry_after(served_random: Served) -> None:
    """64 sequences run and 1,024 wait; the ninth request of 128 goes over that, and nothing of it stays behind."""
    body = {"prompt": [5], "n": 128, "max_tokens": 400, "ignore_eos": True, "stream": True}
    refusals: list[httpx.Response] = []

    async def ask(client: httpx.AsyncClient, full: asyncio.Event) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                refusals.append(response)
                full.set()
            await full.wait()  # whoever was let in holds its place until somebody was refused

    async def crowd() -> None:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=served_random.url, timeout=60, trust_env=False, limits=limits) as client:
            full = asyncio.Event()
            await asyncio.wait_for(asyncio.gather(*(ask(client, full) for _ in range(10))), 60)

    asyncio.run(crowd())
    assert refusals
    for response in refusals:
        assert (response.status_code, response.headers["retry-after"]) == (429, "1"), response.text
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    wait_idle(served_random, 20)
    one = httpx.post(f"{served_random.url}/v1/completions", json={"prompt": [5], "max_tokens": 3}, trust_env=False)
    assert one.status_code == 200
