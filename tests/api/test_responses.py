"""/v1/responses with OpenAI's own client, over a trunk and a gateway in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from in_process import Trunk, served
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from moe_ray.api.responses.answers import ResponseObject
from moe_ray.api.responses.memory import ResponseMemory, ResponseStore
from moe_ray.api.service import HttpOptions
from moe_ray.api.sse import SseReader
from moe_ray.errors import ExpertUnavailable

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 8}
RUNNING = ("queued", "in_progress")


@pytest.fixture(scope="module")
def chatty(kernel_model: Path) -> Iterator[Trunk]:
    """A trunk of a model with a whole vocabulary, so that chat templates can be told to it."""
    running = Trunk(kernel_model)
    yield running
    running.close()


@pytest.fixture
def slow(chatty: Trunk) -> Iterator[Trunk]:
    """The trunk, which a test may slow down or break."""
    yield chatty
    chatty.engine.pause_s, chatty.engine.error = 0.0, None


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(chatty: Trunk, kernel_model: Path, runner: asyncio.Runner) -> Iterator[openai.AsyncOpenAI]:
    """OpenAI's client of one gateway, which is in no hurry to send headers; its loop is `runner`'s."""
    gateway = asked(chatty, kernel_model, ResponseMemory(10**7, 1000), HttpOptions(headers_within_s=30))
    yield runner.run(gateway.__aenter__())
    runner.run(gateway.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def small(chatty: Trunk, kernel_model: Path, runner: asyncio.Runner) -> Iterator[openai.AsyncOpenAI]:
    """OpenAI's client of a gateway that stores little, and sends headers early."""
    options = HttpOptions(headers_within_s=0.1, keep_alive_s=0.1)
    gateway = asked(chatty, kernel_model, ResponseMemory(8_000, 2), options)
    yield runner.run(gateway.__aenter__())
    runner.run(gateway.__aexit__(None, None, None))


@asynccontextmanager
async def asked(
    trunk: Trunk, directory: Path, store: ResponseStore | None, options: HttpOptions | None = None
) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of a gateway with a store of its own."""
    async with (
        served(directory, [trunk.info], options, responses=store) as http,
        openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def ended(client: openai.AsyncOpenAI, response_id: str) -> Response:
    """A background response once it has ended."""
    async with asyncio.timeout(20):
        while (response := await client.responses.retrieve(response_id)).status in RUNNING:
            await asyncio.sleep(0.02)
    return response


async def idle(trunk: Trunk) -> None:
    async with asyncio.timeout(10):
        while (stats := trunk.runtime.stats()).num_running or stats.num_waiting:
            await asyncio.sleep(0.02)


async def raw(client: openai.AsyncOpenAI, method: str, path: str, **how: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=str(client.base_url), trust_env=False, timeout=60) as http:
        return await http.request(method, path, **how)


def events_of(body: bytes) -> list[Any]:
    """The events of a stream, each as OpenAI's library knows it."""
    events = [json.loads(data) for data in SseReader().feed(body)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return [EVENT.validate_python(event) for event in events]


# ---- whole and streamed


def test_whole_and_streamed_say_the_same(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        whole = await client.responses.create(model="random", input="Hello", **GREEDY)
        assert (whole.status, whole.store) == ("incomplete", True)  # type: ignore[attr-defined]
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage is not None
        assert whole.usage.output_tokens == 8
        answer = await raw(client, "POST", "responses", json={"input": "Hello", "stream": True, **GREEDY})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.startswith("event: response.created\ndata: {")
        events = events_of(answer.content)
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
        assert set(kinds[4:-4]) == {"output_text.delta"}
        assert "".join(event.delta for event in events[4:-4]) == whole.output_text
        final = events[-1].response
        assert final.output_text == whole.output_text
        assert final.usage.model_copy(update={"input_tokens_details": None}) == whole.usage.model_copy(
            update={"input_tokens_details": None}
        )

    runner.run(ask())


def test_the_clients_stream_helper_puts_it_together(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        whole = await client.responses.create(input="Hello", model="random", **GREEDY)
        stop = whole.output_text[6:12]
        asked: dict[str, Any] = {"input": "Hello", "model": "random", "extra_body": {"stop": stop}, **GREEDY}
        stopped = await client.responses.create(**asked)
        assert (stopped.status, stopped.incomplete_details) == ("completed", None)
        assert stopped.output_text == whole.output_text[: whole.output_text.index(stop)]
        async with client.responses.stream(**asked) as stream:
            text = ""
            async for event in stream:
                if event.type == "response.output_text.delta":
                    text += event.delta
                    assert event.snapshot == text
            final = await stream.get_final_response()
        assert final.output_text == text == stopped.output_text

    runner.run(ask())


def test_the_response_repeats_its_request(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        given: dict[str, Any] = {
            "instructions": "Be kind.",
            "metadata": {"who": "me"},
            "top_p": 0.5,
            "truncation": "auto",
            "user": "u",
            "reasoning": {"effort": "low"},
            "include": ["reasoning.encrypted_content"],
            "store": False,
            "parallel_tool_calls": False,
            **GREEDY,
        }
        answer = await raw(client, "POST", "responses", json={"input": "Hi", "top_k": 5, **given})
        body = answer.json()
        ResponseObject.model_validate(body)
        for name in ("instructions", "metadata", "top_p", "truncation", "user", "store", "parallel_tool_calls"):
            assert body[name] == given[name]
        assert body["reasoning"] == {"effort": None, "summary": None}
        assert (body["model"], body["object"], body["background"], body["error"]) == ("random", "response", False, None)
        assert (await raw(client, "GET", f"responses/{body['id']}")).status_code == 404, "it was not to be stored"

    runner.run(ask())


def test_logprobs(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        include: Any = ["message.output_text.logprobs"]
        whole = await client.responses.create(input="Hi", model="random", include=include, top_logprobs=2, **GREEDY)
        (message,) = whole.output
        assert message.type == "message"
        (part,) = message.content
        assert part.type == "output_text"
        assert part.logprobs is not None
        assert "".join(entry.token for entry in part.logprobs) == whole.output_text
        assert all(entry.top_logprobs[0].token == entry.token for entry in part.logprobs), "greedy"
        assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
        told = []
        async for event in await client.responses.create(
            input="Hi", model="random", include=include, stream=True, **GREEDY
        ):
            if event.type == "response.output_text.delta":
                told += [entry.token for entry in event.logprobs]
        assert told == [entry.token for entry in part.logprobs]

    runner.run(ask())


# ---- conversations


def test_a_response_goes_on_from_another(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        first = await client.responses.create(input="One", model="random", instructions="Not kept.", **GREEDY)
        second = await client.responses.create(
            input="Two", model="random", previous_response_id=first.id, instructions="New.", **GREEDY
        )
        third = await client.responses.create(
            input=[{"role": "user", "content": "Three"}], model="random", previous_response_id=second.id, **GREEDY
        )
        said = [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "Two"},
            *second.output,
            {"role": "user", "content": "Three"},
        ]
        at_once = await client.responses.create(input=said, model="random", store=False, **GREEDY)  # type: ignore[arg-type]
        assert at_once.usage is not None
        assert third.usage is not None
        assert (third.usage.input_tokens, third.output_text) == (at_once.usage.input_tokens, at_once.output_text)
        assert third.previous_response_id == second.id
        assert at_once.usage.input_tokens_details.cached_tokens > 0
        await client.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(input="Four", model="random", previous_response_id=second.id)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
        assert first.id in caught.value.message

    runner.run(ask())


def test_get_delete_and_input_items(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        said: Any = [{"role": "user", "content": str(i)} for i in range(3)]
        made = await client.responses.create(input=said, model="random", **GREEDY)
        assert await client.responses.retrieve(made.id) == made
        listed = [item async for item in client.responses.input_items.list(made.id, limit=2)]
        texts = [item.content[0].text for item in listed]  # type: ignore[union-attr]
        assert texts == ["2", "1", "0"], "three items on two pages, the last one first"
        page = await client.responses.input_items.list(made.id, order="asc", after=listed[-1].id)
        assert [item.id for item in page.data] == [listed[1].id, listed[0].id]
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.responses.input_items.list(made.id, limit=0)
        assert wrong.value.param == "limit"
        await client.responses.delete(made.id)
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError) as gone:
                await call(made.id)
            error = gone.value.body
            assert isinstance(error, dict)
            assert error["message"] == f"Response with id '{made.id}' not found."
            assert (error["type"], error["param"]) == ("invalid_request_error", "response_id")

    runner.run(ask())


def test_those_not_used_for_long_make_room(small: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        one, two, three = [await small.responses.create(input=f"{i}", model="random", **GREEDY) for i in range(3)]
        with pytest.raises(openai.NotFoundError):
            await small.responses.retrieve(one.id)
        for kept in (two, three):
            assert (await small.responses.retrieve(kept.id)).id == kept.id
        metadata = {str(i): "x" * 512 for i in range(16)}
        large = await small.responses.create(input="Hi", model="random", metadata=metadata, **GREEDY)
        assert (two.store, large.store) == (True, False), "it does not fit"  # type: ignore[attr-defined]

    runner.run(ask())


def test_a_server_that_stores_nothing(chatty: Trunk, kernel_model: Path) -> None:
    async def ask() -> None:
        async with asked(chatty, kernel_model, None) as client:
            made = await client.responses.create(input="Hi", model="random", **GREEDY)
            assert made.store is False  # type: ignore[attr-defined]
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made.id)
            for body, param in (
                ({"store": True}, "store"),
                ({"background": True}, "background"),
                ({"previous_response_id": made.id}, "previous_response_id"),
            ):
                with pytest.raises(openai.BadRequestError, match="responses_memory_mib") as caught:
                    await client.responses.create(input="Hi", model="random", **body)  # type: ignore[call-overload]
                assert caught.value.param == param

    asyncio.run(ask())


# ---- the background


def test_a_response_in_the_background(slow: Trunk, client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        whole = await client.responses.create(input="Hello", model="random", **GREEDY)
        slow.engine.pause_s = 0.5
        started = await client.responses.create(input="Hello", model="random", background=True, **GREEDY)
        assert (started.status, started.output, started.usage) == ("queued", [], None)
        with pytest.raises(openai.BadRequestError, match="still"):
            await client.responses.create(input="x", model="random", previous_response_id=started.id)
        slow.engine.pause_s = 0
        done = await ended(client, started.id)
        assert (done.status, done.output_text, done.background) == ("incomplete", whole.output_text, True)
        assert await client.responses.cancel(done.id) == done, "it has ended"
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            await client.responses.cancel(whole.id)
        with pytest.raises(openai.BadRequestError, match="`background` and `stream`"):
            await client.responses.retrieve(done.id, stream=True)

    runner.run(ask())


def test_a_stream_in_the_background_is_taken_up_again(
    slow: Trunk, client: openai.AsyncOpenAI, runner: asyncio.Runner
) -> None:
    async def ask() -> None:
        slow.engine.pause_s = 0.1
        seen = []
        async for event in await client.responses.create(
            input="Hello", model="random", background=True, stream=True, **GREEDY
        ):
            seen.append(event)
            if event.type == "response.output_text.delta":
                break  # the client is gone, and the response is computed on
        assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
        response_id = seen[0].response.id  # type: ignore[union-attr]
        rest = await client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
        seen += [event async for event in rest]
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        done = await client.responses.retrieve(response_id)
        assert (done.status, done.output_text) == ("incomplete", text)
        again = await raw(client, "GET", f"responses/{response_id}", params={"stream": "true"})
        assert [event.type for event in events_of(again.content)] == [event.type for event in seen]

    runner.run(ask())


def test_cancelled_and_deleted_ones_free_the_engine(
    slow: Trunk, client: openai.AsyncOpenAI, runner: asyncio.Runner
) -> None:
    async def ask() -> None:
        slow.engine.pause_s = 0.2
        for end in ("cancel", "delete"):
            before = slow.runtime.stats().generated_tokens
            started = await client.responses.create(input="Hello", model="random", background=True, temperature=0)
            stop: Callable[[str], Awaitable[Any]] = getattr(client.responses, end)
            told = await stop(started.id)
            await idle(slow)
            assert slow.runtime.stats().generated_tokens - before < 40
            if end == "cancel":
                assert told.status == "cancelled"
                assert await client.responses.retrieve(started.id) == told

    runner.run(ask())


def test_one_that_fails_in_the_background(slow: Trunk, client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        slow.engine.error = ExpertUnavailable("expert 3 of layer 1 at 10.0.0.3:4711")
        started = await client.responses.create(input="Hello", model="random", background=True)
        failed = await ended(client, started.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "server_error"
        assert "10.0.0.3" not in failed.error.message

    runner.run(ask())


# ---- failures


def test_a_failure_is_a_status_or_else_an_event(
    slow: Trunk, small: openai.AsyncOpenAI, client: openai.AsyncOpenAI, runner: asyncio.Runner
) -> None:
    async def ask() -> None:
        slow.engine.error = ExpertUnavailable("expert 3")
        for stream in (False, True):
            answer = await raw(client, "POST", "responses", json={"input": "Hi", "stream": stream})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "service_unavailable_error"
        slow.engine.pause_s = 0.5
        answer = await raw(small, "POST", "responses", json={"input": "Hi", "stream": True})
        events = events_of(answer.content)
        assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
        failed = events[-1].response
        assert (failed.status, failed.error.code) == ("failed", "server_error")
        assert (await small.responses.retrieve(failed.id)).status == "failed"

    runner.run(ask())


def test_a_client_that_leaves_frees_the_engine(slow: Trunk, client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        slow.engine.pause_s = 0.2
        before = slow.runtime.stats().generated_tokens
        stream = await client.responses.create(input="Hello", model="random", stream=True, temperature=0)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        await idle(slow)
        assert slow.runtime.stats().generated_tokens - before < 40

    runner.run(ask())


def test_errors_are_in_openais_format(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.responses.create(input="Hi", model="gpt-5")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(input="Hi", model="random", tools=[{"type": "web_search"}])
        assert (refused.value.param, refused.value.code) == ("tools[0].type", "invalid_value")
        with pytest.raises(openai.BadRequestError, match="maximum context length") as too_long:
            await client.responses.create(input="Hi " * 600, model="random")
        assert (too_long.value.param, too_long.value.code) == ("input", "context_length_exceeded")
        for path, params, param in (
            ("responses/x", {"stream": "perhaps"}, "stream"),
            ("responses/x", {"colour": "red"}, "colour"),
            ("responses/x/input_items", {"order": "random"}, "order"),
        ):
            answer = await raw(client, "GET", path, params=params)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await raw(client, "PUT", "responses/x")).status_code == 405

    runner.run(ask())


def test_openapi_describes_the_routes(client: openai.AsyncOpenAI, runner: asyncio.Runner) -> None:
    async def ask() -> None:
        document = (await raw(client, "GET", "../openapi.json")).json()
        create = document["paths"]["/v1/responses"]["post"]
        fields = create["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert {"input", "previous_response_id", "text", "tools", "background"} <= fields.keys()
        answers = create["responses"]["200"]["content"]
        assert set(answers) == {"application/json", "text/event-stream"}
        retrieve = document["paths"]["/v1/responses/{response_id}"]["get"]
        assert {each["name"] for each in retrieve["parameters"]} >= {"response_id", "stream", "starting_after"}

    runner.run(ask())
