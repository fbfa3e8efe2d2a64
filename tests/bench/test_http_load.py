"""The load client: its numbers from hand-made samples, and what it says of servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moe_ray.bench.free_port import free_port
from moe_ray.bench.http_load import Sample, Target, Wave, id_prompts, percentile, run_wave, served_model
from moe_ray.bench.serve import ServeBenchOptions, run_serve, serve_row
from moe_ray.commands.options import numbers
from moe_ray.errors import ConfigError, NotReady


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def token(text: str = "ka", finish_reason: str | None = None) -> str:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}], usage=None)


USAGE = event(choices=[], usage={"prompt_tokens": 8, "completion_tokens": 3})
DONE = "data: [DONE]\n\n"


@contextmanager
def peer(*streams: str, status: str = "200 OK") -> Iterator[str]:
    """A server that answers its n-th completion with the n-th stream and hangs up; "" hangs up at once."""
    left = iter(streams)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length:"))
        await reader.readexactly(length)
        if body := next(left):
            writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode())
            await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def load(url: str, count: int, concurrency: int = 1) -> list[Sample]:
    target = Target(url, "some-model", max_tokens=3, timeout_s=10)
    prompts = list(id_prompts(count, 8, 100, "0"))
    return asyncio.run(run_wave(target, prompts, concurrency, lambda: None)).samples


# ---- numbers


def test_percentile() -> None:
    assert percentile([], 50) is None
    assert percentile([7.0], 99) == 7.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)


def test_prompts_of_ids_are_exact_and_differ() -> None:
    prompts = list(id_prompts(100, 16, 32_000, "0 warm-up"))
    assert {len(prompt) for prompt in prompts} == {16}
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 100
    assert min(map(min, prompts)) >= 3
    assert max(map(max, prompts)) < 32_000
    assert prompts == list(id_prompts(100, 16, 32_000, "0 warm-up"))
    assert prompts != list(id_prompts(100, 16, 32_000, "1 warm-up"))


def test_a_row_is_the_median_over_repeats() -> None:
    def wave(wall_s: float) -> Wave:
        good = Sample(started=1.0, ended=1.7, arrivals=[1.2, 1.3, 1.6], tokens=5)  # the third chunk brings three
        failed = Sample(started=1.0, ended=1.1, arrivals=[1.05], tokens=1, error="1 of 5 tokens")
        return Wave([good, good, failed], wall_s, cpu_s=0.1)

    row = serve_row(2, [wave(2.0), wave(4.0), wave(2.5)])
    assert row == {
        "concurrency": 2,
        "requests": 9,
        "output_tokens_per_s": 4.0,
        "output_tokens_per_s_min": 2.5,
        "output_tokens_per_s_max": 5.0,
        "ttft_p50_ms": pytest.approx(200),
        "ttft_p99_ms": pytest.approx(200),
        "itl_p50_ms": pytest.approx(200),
        "itl_p99_ms": pytest.approx(300),
        "tpot_p50_ms": pytest.approx(100),
        "e2e_p50_ms": pytest.approx(700),
        "wall_s": 2.5,
        "client_cpu_fraction": 0.04,
        "errors": 3,
    }


def test_a_row_of_nothing_but_errors() -> None:
    row = serve_row(1, [Wave([Sample(0.0, 1.0, error="HTTP 500")], 1.0, 0.0)])
    assert row["output_tokens_per_s"] == 0
    assert row["ttft_p50_ms"] is None
    assert row["errors"] == 1


# ---- servers


def test_tokens_are_counted_by_usage() -> None:
    two_at_once = token() + token("kato", "length") + USAGE + DONE
    with peer(two_at_once) as url:
        (sample,) = load(url, 1)
    assert sample.error is None
    assert (sample.tokens, sample.prompt_tokens, len(sample.arrivals)) == (3, 8, 2)
    assert sample.started < sample.arrivals[0] <= sample.arrivals[1] <= sample.ended


def test_a_server_without_usage_is_believed_when_it_stops_at_the_limit() -> None:
    with peer(token() + token() + token("", "length") + DONE, token() + token("", "stop") + DONE) as url:
        full, short = load(url, 2)
    assert (full.tokens, full.error) == (3, None)
    assert short.error == "1 of 3 tokens, finish_reason 'stop'"


def test_what_goes_wrong_is_told_and_the_rest_goes_on() -> None:
    whole = token() + token() + token("ka", "length") + USAGE + DONE
    streams = [
        "",
        event(error={"message": "no replica\nof Expert3", "code": 503}),
        "data: {not json}\n\n",
        "data: [1]\n\n",
        token() + DONE,
        whole,
    ]
    with peer(*streams) as url:
        hung_up, error, garbage, array, short, good = load(url, len(streams))
    assert str(hung_up.error).startswith("RemoteProtocolError")
    assert error.error == "no replica of Expert3"
    assert garbage.error == "not an event of a completion: {not json}"
    assert array.error == "not an event of a completion: [1]"
    assert short.error == "1 of 3 tokens, finish_reason None"
    assert good.error is None


def test_http_errors_are_told() -> None:
    body = json.dumps({"error": {"message": "the model `x` does not exist"}})
    with peer(body, "<html>", status="404 Not Found") as url:
        first, second = load(url, 2)
        assert first.error == "HTTP 404: the model `x` does not exist"
        assert second.error == "HTTP 404: <html>"
    with peer(body, status="404 Not Found") as url, pytest.raises(NotReady, match=r"first request .* does not exist"):
        run_serve(ServeBenchOptions(url=url, model="x", prompt_tokens=8), quiet)


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for wrong in (url, "http://nowhere.invalid", "http://[", "ftp://127.0.0.1"):
        with pytest.raises(NotReady, match="no server answers at "):
            asyncio.run(served_model(wrong, None))


# ---- mistakes


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--send text needs --tokenizer"):
        run_serve(ServeBenchOptions(url="http://127.0.0.1:1", send="text"), quiet)
    with pytest.raises(ConfigError, match="--pid is for a server started by hand"):
        run_serve(ServeBenchOptions(pid=1), quiet)
    assert numbers("1,8, 32,8", "--concurrency") == (1, 8, 32)
    for wrong in ("", "1,", "0", "1,-2", "many"):
        with pytest.raises(ConfigError, match="--concurrency: expected numbers"):
            numbers(wrong, "--concurrency")
