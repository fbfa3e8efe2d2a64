"""What keeps responses: bounds, conversations, and responses in the background, without a model."""

from __future__ import annotations

import asyncio
import json

import pytest

from moe_ray.api.responses import memory
from moe_ray.api.responses.body import GATEWAY_GONE
from moe_ray.api.responses.memory import SILENT_S, ResponseMemory, StoredResponse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stored(name: str, previous: str | None = None, status: str = "completed", size: int = 1000) -> StoredResponse:
    body = json.dumps({"id": name, "status": status, "output": [], "filler": "x" * size})
    return StoredResponse(name, status, body, "[]", previous)


async def names(kept: ResponseMemory, *asked: str) -> str:
    """Those that are kept, of those asked for: looked at without being used."""
    return " ".join(name for name in asked if name in kept._kept)


def test_the_longest_unused_goes_first_by_number_and_by_bytes() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 3)
        for name in "abc":
            assert await kept.put(stored(name))
        assert await kept.get("a") is not None  # used now
        assert await kept.put(stored("d"))
        assert await names(kept, *"abcd") == "a c d"
        one = kept.num_bytes / 3
        kept = ResponseMemory(int(one * 3.5), 100)
        for name in "abcd":
            assert await kept.put(stored(name))
        assert await names(kept, *"abcd") == "b c d"
        assert kept.num_bytes == one * 3
        assert not await kept.put(stored("huge", size=10**5))
        assert await names(kept, "huge") == ""

    asyncio.run(test())


def test_a_response_outlives_those_that_go_on_from_it() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 4)
        for name, previous in (("a1", None), ("b1", None), ("a2", "a1"), ("a3", "a2")):
            assert await kept.put(stored(name, previous))
        assert [each.response_id for each in await kept.conversation("a3")] == ["a3", "a2", "a1"]
        assert await kept.put(stored("b2", "b1"))  # b is used now, so a makes room: from its end
        assert await names(kept, "a1", "a2", "a3", "b1", "b2") == "a1 a2 b1 b2"
        assert await kept.put(stored("b3", "b2"))
        assert await names(kept, "a1", "a2", "b1", "b2", "b3") == "a1 b1 b2 b3"
        assert not await kept.put(stored("b5", "b4")) or len(kept) <= 4

    asyncio.run(test())


def test_a_conversation_ends_where_an_ancestor_was_deleted() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 10)
        for name, previous in (("a1", None), ("a2", "a1"), ("a3", "a2")):
            await kept.put(stored(name, previous))
        before = kept.num_bytes
        assert await kept.delete("a2")
        assert not await kept.delete("a2")
        assert await kept.get("a2") is None
        (only,) = await kept.conversation("a3")
        assert only.previous_id == "a2"
        assert await kept.conversation("a2") == []
        assert kept.num_bytes < before
        for name in ("a1", "a3"):
            await kept.delete(name)
        assert (kept.num_bytes, len(kept)) == (0, 0)

    asyncio.run(test())


def test_what_is_computed_is_not_pushed_out() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 2)
        assert await kept.begin(stored("running", status="queued"), None)
        for name in "abc":
            assert await kept.put(stored(name))
        assert await names(kept, "running", *"abc") == "running c"
        assert await kept.advance("running", "in_progress") == "on"
        found = await kept.get("running")
        assert found is not None
        assert (found.status, json.loads(found.response)["status"]) == ("in_progress", "in_progress")
        await kept.finish(stored("running"))
        assert await kept.advance("running", "in_progress") == "stopped"
        await kept.put(stored("d"))
        await kept.put(stored("e"))
        assert await names(kept, "running", *"de") == "d e"

    asyncio.run(test())


def test_a_cancelled_response_stays_cancelled() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 10)
        await kept.begin(stored("a", status="in_progress"), None)
        cancelled = await kept.cancel("a")
        assert cancelled is not None
        assert json.loads(cancelled.response)["status"] == cancelled.status == "cancelled"
        assert await kept.advance("a", "in_progress") == "stopped"
        await kept.finish(stored("a"))
        assert await kept.get("a") == cancelled == await kept.cancel("a")
        assert await kept.cancel("b") is None
        await kept.put(stored("done"))
        done = await kept.cancel("done")
        assert done is not None
        assert done.status == "completed"

    asyncio.run(test())


def test_a_response_whose_gateway_is_silent_has_failed() -> None:
    async def test() -> None:
        clock = Clock()
        kept = ResponseMemory(10**6, 10, clock)
        await kept.begin(stored("a", status="queued"), None)
        clock.now = SILENT_S - 1
        await kept.advance("a", "in_progress")
        clock.now += SILENT_S - 1
        assert (await kept.conversation("a"))[0].status == "in_progress"
        clock.now += 2
        failed = await kept.get("a")
        assert failed is not None
        body = json.loads(failed.response)
        assert (failed.status, body["status"], body["error"]["message"]) == ("failed", "failed", GATEWAY_GONE)
        assert await kept.advance("a", "in_progress") == "stopped"

    asyncio.run(test())


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_RUNNING", 2)


def test_only_so_many_are_computed_at_a_time(few_at_a_time: None) -> None:
    async def test() -> None:
        clock = Clock()
        kept = ResponseMemory(10**6, 10, clock)
        assert await kept.begin(stored("a", status="queued"), None)
        assert await kept.begin(stored("b", status="queued"), None)
        assert not await kept.begin(stored("c", status="queued"), None)
        await kept.finish(stored("a"))
        assert await kept.begin(stored("c", status="queued"), None)
        clock.now += SILENT_S + 1  # the gateways of both are gone
        assert await kept.begin(stored("d", status="queued"), None)

    asyncio.run(test())


def test_events_are_read_behind_a_number_and_waited_for() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 10)
        await kept.put(stored("plain"))
        assert await kept.events("plain", -1, 0) is None
        assert await kept.events("nothing", -1, 0) is None
        await kept.begin(stored("a", status="in_progress"), ["0", "1"])
        assert await kept.events("a", -1, 0) == (["0", "1"], False)
        assert await kept.events("a", 0, 0) == (["1"], False)
        assert await kept.events("a", 1, 0.01) == ([], False)
        readers = [asyncio.create_task(kept.events("a", 1, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        await kept.advance("a", "in_progress", ["2"])
        assert [await reader for reader in readers] == [(["2"], False)] * 2
        last = asyncio.create_task(kept.events("a", 2, 10))
        await asyncio.sleep(0)
        await kept.finish(stored("a"), ["3"])
        assert await last == (["3"], True)
        assert await kept.events("a", 0, 10) == (["1", "2", "3"], True)
        assert await kept.events("a", 7, 10) == ([], True)

    asyncio.run(test())


def test_readers_of_a_deleted_stream_are_let_go() -> None:
    async def test() -> None:
        kept = ResponseMemory(10**6, 10)
        await kept.begin(stored("a", status="in_progress"), ["0"])
        reader = asyncio.create_task(kept.events("a", 0, 10))
        await asyncio.sleep(0)
        await kept.delete("a")
        assert await reader is None

    asyncio.run(test())


def test_events_that_do_not_fit_are_told() -> None:
    async def test() -> None:
        kept = ResponseMemory(20_000, 10)
        await kept.put(stored("old"))
        await kept.begin(stored("a", status="in_progress"), [])
        assert await kept.advance("a", "in_progress", ["x" * 16_500]) == "on"
        assert await names(kept, "old", "a") == "a"
        assert await kept.advance("a", "in_progress", ["x" * 16_500]) == "full"
        await kept.finish(stored("a", status="failed"), ["last"])
        assert kept.num_bytes <= 20_000
        assert await kept.events("a", 0, 0) is None
        failed = await kept.get("a")
        assert failed is not None
        assert failed.status == "failed"

    asyncio.run(test())
