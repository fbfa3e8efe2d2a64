"""The gateway's HTTP application over a trunk in this process: authorisation, streams that wait, what OpenAI allows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
from in_process import LOAD, Trunk, served

from moe_ray.api.http import OPEN_PATHS, build_app
from moe_ray.api.observation import PROBES
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.api.sse import KEEP_ALIVE, SseReader
from moe_ray.config import load_config
from moe_ray.errors import ConfigError, ExpertUnavailable
from moe_ray.gateway.sessions import Sessions
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.transport.base import LinkOptions

KEYS = ("first-key", "second-key")
ASK: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def slow(trunk: Trunk) -> Iterator[Trunk]:
    """The trunk, which a test may slow down or break."""
    yield trunk
    trunk.engine.pause_s, trunk.engine.error = 0.0, None


async def post(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def idle(trunk: Trunk) -> None:
    """Wait until nothing runs or waits in the trunk."""
    end = time.monotonic() + 10
    while (stats := trunk.runtime.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < end, stats
        await asyncio.sleep(0.02)


# ---- every route


async def _no_load() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def app(readable_model: Path) -> fastapi.FastAPI:
    """The application alone, with keys."""

    async def nothing() -> list[Any]:
        return []

    sessions = Sessions(nothing, LinkOptions())
    return build_app(ServedModel("m", Tokenizer(readable_model), sessions, HttpOptions(api_keys=KEYS)), _no_load)


def routes(app: fastapi.FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route."""
    found = []
    for route in app.routes:
        methods = getattr(route, "methods", None)
        assert methods, f"{route} has no methods: say here how it is asked"
        found += [(method, route.path.replace("{model:path}", "m")) for method in methods]  # type: ignore[attr-defined]
    return found


def test_no_route_answers_without_a_key(app: fastapi.FastAPI) -> None:
    every = routes(app)
    assert {path for _, path in every} >= {
        *("/health", "/experts", "/openapi.json", "/v1/models", "/v1/models/m"),
        *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/api/chat", "/api/tags"),
        *("/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations", "/vertex", "/info"),
    }
    assert not {"/docs", "/redoc"} & {path for _, path in every}, "their pages would load scripts from elsewhere"
    unknown = [("GET", "/docs"), ("GET", "/"), ("GET", "/health/x"), ("POST", "/v1/nothing"), ("OPTIONS", "/v1/models")]

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            for method, path in [*every, *unknown]:
                for headers in (
                    *({}, {"Authorization": "Bearer third-key"}, {"Authorization": KEYS[0]}),
                    *({"x-api-key": "third-key"}, {"x-api-key": f"Bearer {KEYS[0]}"}),
                ):
                    for slash in ("", "/"):
                        response = await client.request(method, path + slash, headers=headers)
                        if path in OPEN_PATHS:
                            # No trunk is up; of that, too, Prometheus is told.
                            assert response.status_code == (200 if path == "/metrics" else 503)
                            continue
                        if path == "/page/{name}":
                            assert response.status_code == 404, "files of the page are open, and this is none"
                            continue
                        assert response.status_code == 401, (method, path)
                        assert response.headers["www-authenticate"] == "Bearer"
                        if method != "HEAD":
                            assert "Incorrect API key" in response.text or "No API key" in response.text
                            assert not any(key in response.text for key in KEYS)
            for key in KEYS:
                assert (await client.get("/v1/models", headers={"x-api-key": key})).status_code == 200
                shown = {"Authorization": f"Bearer {key}"}
                assert (await client.get("/v1/models", headers=shown)).status_code == 200
                missing = await client.get("/docs", headers=shown)
                assert (missing.status_code, missing.json()["error"]["message"]) == (404, "no route GET /docs")

    asyncio.run(ask())


def test_the_document_says_where_keys_are_asked_for(app: fastapi.FastAPI) -> None:
    document = app.openapi()
    assert {next(iter(way)) for way in document["security"]} == set(document["components"]["securitySchemes"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert (operation.get("security") == []) == (path in OPEN_PATHS)
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)
            assert path in PROBES or "503" in operation["responses"], "of a gateway that is full"
    unlisted = {path for _, path in routes(app)} - set(document["paths"])
    adapters = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # listed where requests may change them
    assert unlisted == {"/openapi.json", "/page/{name}", "/v1/models/m", *adapters}


def test_below_a_prefix_health_is_open_and_nothing_else(app: fastapi.FastAPI) -> None:
    """As Serve mounts an application: the prefix is in `root_path` and in `path`."""

    async def ask() -> None:
        transport = httpx.ASGITransport(app, root_path="/served")
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            assert (await client.get("/served/health")).status_code == 503
            for path in ("/served/v1/models", "/served/health/health", "/v1/models", "/served/"):
                assert (await client.get(path)).status_code == 401
            shown = {"Authorization": f"Bearer {KEYS[1]}"}
            for root in ("/served", "/served/"):
                refused = await client.post(root, json={}, headers=shown)
                assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
            assert (await client.get("/served/v1/models/", headers=shown)).json()["data"][0]["id"] == "m"

    asyncio.run(ask())


def test_a_slash_at_the_end_changes_nothing(trunk: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [trunk.info]) as client:
            for path in ("/v1/models", "/v1/models/random", "/health", "/experts", "/openapi.json"):
                with_slash, without = await client.get(f"{path}/"), await client.get(path)
                assert (with_slash.status_code, with_slash.content) == (200, without.content)
            assert (await client.get("/experts")).json() == LOAD
            answer = await client.post("/v1/completions/", json=ASK)
            assert answer.json()["usage"]["completion_tokens"] == 4

    asyncio.run(ask())


def test_only_named_origins_may_ask_from_a_browser(trunk: Trunk, readable_model: Path) -> None:
    wanted = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    preflight = {**wanted, "Access-Control-Request-Headers": "authorization,content-type"}

    async def ask() -> None:
        options = HttpOptions(api_keys=KEYS, cors_origins=["https://chat.example.org"])
        async with served(readable_model, [trunk.info], options) as client:
            allowed = await client.options("/v1/chat/completions", headers=preflight)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            refused = await client.get("/v1/models", headers=wanted)
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://chat.example.org"
            other = await client.options(
                "/v1/chat/completions", headers={**preflight, "Origin": "https://evil.example"}
            )
            assert "access-control-allow-origin" not in other.headers
        async with served(readable_model, [trunk.info]) as client:
            assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=wanted)).headers

    asyncio.run(ask())


# ---- streams that wait


@contextlib.asynccontextmanager
async def stream(client: httpx.AsyncClient, **body: Any) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
    async with client.stream("POST", "/v1/completions", json={**ASK, **body, "stream": True}) as response:
        yield response, response.aiter_raw()


def data_of(raw: bytes) -> list[Any]:
    """The JSON of each event before [DONE]."""
    *events, last = SseReader().feed(raw)
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


IMPATIENT = HttpOptions(headers_within_s=0.1, keep_alive_s=0.1)
PATIENT = HttpOptions(headers_within_s=60, keep_alive_s=60, retry_after_s=7)


def test_headers_and_comments_come_before_a_slow_first_token(slow: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [slow.info], IMPATIENT) as client:
            slow.engine.pause_s = 1.0
            async with stream(client, max_tokens=2) as (response, pieces):
                first = await anext(pieces)
                assert (response.status_code, first.decode()) == (200, KEEP_ALIVE), "before the first token"
                rest = b"".join([piece async for piece in pieces])
            assert rest.decode().count(KEEP_ALIVE) >= 3, "one each 0.1 s of two steps of a second"
            chunks = data_of(first + rest)
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        slow.engine.pause_s = 0.0
        async with served(readable_model, [slow.info], PATIENT) as client:
            whole = await post(client, max_tokens=2)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
            async with stream(client, max_tokens=2) as (_, pieces):
                assert KEEP_ALIVE.encode() not in b"".join([piece async for piece in pieces])

    asyncio.run(ask())


def test_what_fails_after_the_headers_is_an_event(slow: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        slow.engine.error = ExpertUnavailable("expert 3 of layer 1 at 10.0.0.3:4711")
        async with served(readable_model, [slow.info], IMPATIENT) as client:
            slow.engine.pause_s = 1.0
            async with stream(client) as (response, pieces):
                (event,) = data_of(b"".join([piece async for piece in pieces]))
            assert response.status_code == 200
            assert event["error"]["type"] == "service_unavailable_error"
            assert "10.0.0.3" not in event["error"]["message"]
        slow.engine.pause_s = 0.0
        async with served(readable_model, [slow.info], PATIENT) as client:  # before the headers: a status
            for wants_stream in (True, False):
                refused = await client.post("/v1/completions", json={**ASK, "stream": wants_stream})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")

    asyncio.run(ask())


def test_a_client_that_leaves_before_the_first_token_frees_its_sequences(slow: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [slow.info], IMPATIENT) as client:
            slow.engine.pause_s = 0.5
            async with stream(client, prompt=[[5], [6], [7]], max_tokens=400) as (_, pieces):
                await anext(pieces)
            slow.engine.pause_s = 0.0
            await idle(slow)
            assert slow.runtime.stats().generated_tokens < 400

    asyncio.run(ask())


# ---- refusals


def test_what_a_trunk_refuses_is_told_with_the_field(trunk: Trunk, readable_model: Path) -> None:
    """The gateway is made to believe in a larger vocabulary, so that the trunk refuses."""

    async def ask() -> None:
        async with served(readable_model, [trunk.info], vocab_size=1000) as client:
            for field, value in (("prompt", [700]), ("stop_token_ids", [700]), ("logit_bias", {"700": 1})):
                for wants_stream in (True, False):
                    body = {**ASK, field: value, "stream": wants_stream}
                    refused = await client.post("/v1/completions", json=body)
                    error = refused.json()["error"]
                    assert (refused.status_code, error["param"]) == (400, field)
                    assert "between 0 and 511" in error["message"]

    asyncio.run(ask())


def test_a_full_queue_refuses_at_once_even_during_a_long_step(slow: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with contextlib.AsyncExitStack() as held:
            filling = await held.enter_async_context(served(readable_model, [slow.info], IMPATIENT))
            client = await held.enter_async_context(served(readable_model, [slow.info], PATIENT))
            slow.engine.pause_s = 4.0
            for _ in range(3):  # 64 run and 200 may wait, those included that the engine takes in after this step
                _, pieces = await held.enter_async_context(stream(filling, prompt=[[5]] * 80, max_tokens=50))
                await anext(pieces)
            started = time.monotonic()
            refused = await client.post("/v1/completions", json={**ASK, "prompt": [[5]] * 120, "stream": True})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "7"), refused.text
            assert time.monotonic() - started < 3
            slow.engine.pause_s = 0.0

    asyncio.run(ask())
    asyncio.run(idle(slow))


def test_beyond_the_most_requests_it_is_503_and_probes_pass(slow: Trunk, readable_model: Path) -> None:
    slow.engine.pause_s = 0.1
    options = HttpOptions(max_ongoing_requests=2, retry_after_s=7)

    async def ask() -> None:
        async with served(readable_model, [slow.info], options) as client:
            async with stream(client, max_tokens=40), stream(client, max_tokens=40):
                full = await client.post("/v1/completions", json=ASK)
                assert full.status_code == 503
                assert full.headers["retry-after"] == "7"
                assert "2 requests" in full.json()["error"]["message"]
                assert (await client.get("/health")).status_code == 200
            await idle(slow)
            assert (await post(client))["usage"]["completion_tokens"] == 4

    asyncio.run(ask())


def test_without_a_trunk_it_is_503_with_retry_after(readable_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ray.api.service.TRUNK_TIMEOUT_S", 0.2)

    async def ask() -> None:
        async with served(readable_model, [], HttpOptions(retry_after_s=3)) as client:
            health = await client.get("/health")
            assert (health.status_code, health.json()["missing"]) == (503, ["Trunk"])
            refused = await client.post("/v1/completions", json=ASK)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")

    asyncio.run(ask())


# ---- what OpenAI's schema allows


def test_prompts_by_the_hundreds_are_one_request(trunk: Trunk, readable_model: Path) -> None:
    prompts = [[5 + i % 500, 7] for i in range(600)]

    async def ask() -> None:
        async with served(readable_model, [trunk.info]) as client:
            whole = await post(client, prompt=prompts, max_tokens=2)
            assert [choice["index"] for choice in whole["choices"]] == list(range(600))
            assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
            assert whole["usage"]["completion_tokens"] == 1200
            for which in (0, 130, 599):
                alone = await post(client, prompt=prompts[which], max_tokens=2)
                assert whole["choices"][which]["text"] == alone["choices"][0]["text"]
            async with stream(client, prompt=prompts, max_tokens=2) as (_, pieces):
                chunks = data_of(b"".join([piece async for piece in pieces]))
            texts = [""] * 600
            for chunk in chunks:
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
            assert texts == [choice["text"] for choice in whole["choices"]]

    asyncio.run(ask())
    asyncio.run(idle(trunk))


def test_every_seed_of_64_bits_is_taken(trunk: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [trunk.info]) as client:

            async def text(seed: int) -> str:
                answer = await post(client, seed=seed, temperature=2.0, max_tokens=12, logprobs=0)
                return " ".join(answer["choices"][0]["logprobs"]["tokens"])

            for seed in (-2, -(2**63), 2**63 - 1, 0):
                assert await text(seed) == await text(seed)
            assert await text(-2) != await text(2)
            assert await text(-1) != await text(-1), "-1 asks for one to be drawn"

    asyncio.run(ask())


def test_top_p_zero_is_the_most_likely_token(trunk: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [trunk.info]) as client:
            greedy = await post(client, max_tokens=12, top_p=0)
            for seed in range(4):
                drawn = await post(client, max_tokens=12, temperature=2.0, top_p=0, seed=seed)
                assert drawn["choices"][0]["text"] == greedy["choices"][0]["text"]

    asyncio.run(ask())


def test_no_tokens_are_an_answer_too(trunk: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [trunk.info], vocab_size=50_000) as client:
            whole = await post(client, prompt="Hi", echo=True, max_tokens=0)
            (choice,) = whole["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
            assert whole["usage"]["completion_tokens"] == 0
            async with stream(client, max_tokens=0, stream_options={"include_usage": True}) as (_, pieces):
                chunk, usage = data_of(b"".join([piece async for piece in pieces]))
            assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("", "length")
            assert usage["usage"]["completion_tokens"] == 0

    asyncio.run(ask())


def test_line_ends_of_unicode_are_escaped_in_streams(trunk: Trunk, readable_model: Path) -> None:
    async def ask() -> None:
        async with served(readable_model, [trunk.info], vocab_size=50_000) as client:
            prompt = "a\u2028b\u2029c\u0085d"
            async with stream(client, prompt=prompt, echo=True, max_tokens=0) as (_, pieces):
                raw = b"".join([piece async for piece in pieces])
            assert all(line.startswith("data: ") for line in raw.decode().splitlines() if line)
            assert data_of(raw)[0]["choices"][0]["text"] == prompt

    asyncio.run(ask())


# ---- options


def test_the_options_of_http() -> None:
    gateway = load_config().gateway
    assert (gateway.retry_after_s, gateway.headers_within_s, gateway.cors_origins) == (1, 1.0, ())
    with pytest.raises(ConfigError, match=r"`gateway.keep_alive_s`"):
        load_config({"gateway": {"keep_alive_s": 0}})
