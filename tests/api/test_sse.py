"""Server-sent events by their standard: written so that every client finds the line ends, read by its rules."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from moe_ray.api.sse import KEEP_ALIVE, SseReader, event
from moe_ray.bench.http_load import Target, complete, connect
from moe_ray.commands.chat_client import read_pieces

LINE_ENDS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""Where `str.splitlines` ends a line and the standard does not."""
DONE = "data: [DONE]\n\n"


def read(raw: bytes, *sizes: int) -> list[str]:
    """The data of all events of a body that comes in pieces of these sizes, the last one again and again."""
    reader, found, left = SseReader(), [], list(sizes)
    while raw:
        size = left.pop(0) if len(left) > 1 else left[0]
        found += list(reader.feed(raw[:size]))
        raw = raw[size:]
    return found


@pytest.mark.parametrize("character", LINE_ENDS)
def test_one_line_whatever_a_client_takes_for_its_end(character: str) -> None:
    written = event({"text": f"one{character}two 中😀"})
    (line, blank) = written.splitlines()
    assert blank == ""
    assert json.loads(line.removeprefix("data: ")) == {"text": f"one{character}two 中😀"}
    assert "中😀" in line, "other characters stay as they are"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_reading_by_the_rules(end: str, size: int) -> None:
    lines = [
        ": a comment",
        "",
        "data: one",
        "",
        "event: named",
        "id: 4",
        "data:two",
        "data:  lines",
        "data",
        "",
        "",
        "retry: 5",
        "",
        "data: a\u2028b\u2029c\x85d\x0be 😀",
        "",
        "database: no",
        "",
        "data: cut off",
    ]
    found = read(end.join(lines).encode(), size)
    assert found == ["one", "two\n lines\n", "a\u2028b\u2029c\x85d\x0be 😀"]


def test_reading_pieces_of_any_size() -> None:
    rng = random.Random(5)
    raw = b"\xef\xbb\xbf" + "".join(f"data: {i}é\u2028\r\n\r\n{KEEP_ALIVE}" for i in range(40)).encode()
    for _ in range(50):
        assert read(raw, *[rng.randint(1, 9) for _ in range(30)], 5) == [f"{i}é\u2028" for i in range(40)]


def raw_events(*texts: str) -> bytes:
    """A stream of a server that does not escape."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": text}, "text": text}]} for text in texts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
    body = KEEP_ALIVE + "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + DONE
    return body.encode()


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_our_clients_end_lines_where_the_standard_does(character: str) -> None:
    texts = [f"one{character}two", "three"]
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=raw_events(*texts)))
    assert [piece.text for piece in read_pieces([raw_events(*texts)]) if piece.text] == texts

    async def load() -> None:
        async with connect("http://server", None, 5) as client:
            client._transport = transport
            sample = await complete(client, Target("http://server", "m", max_tokens=3), "x")
        assert sample.error is None
        assert len(sample.arrivals) == 2

    asyncio.run(load())
