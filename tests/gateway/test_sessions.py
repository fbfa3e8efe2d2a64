"""A gateway's sessions without Ray: many sequences of one request, trunks that cannot be linked, loops that go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import Trunk, sessions_over

from moe_ray.core import Request, SamplingParams, TokenEvent, TrunkInfo
from moe_ray.errors import EngineError, InvalidRequest, NotReady, Overloaded
from moe_ray.gateway.session import AT_ONCE, Live, Session
from moe_ray.gateway.sessions import Sessions
from moe_ray.gateway.trunk_link import TrunkLink
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport.base import LinkOptions, TlsFiles


@pytest.fixture(scope="module")
def trunk(random_model: Path) -> object:
    running = Trunk(random_model)
    yield running
    running.close()


def requests(count: int) -> list[tuple[int, Request]]:
    return [(i, Request(f"r-{i}", (5, 6), SamplingParams(max_tokens=2))) for i in range(count)]


class Trunks:
    """Takes sequences, and ends or refuses them when told to."""

    def __init__(self) -> None:
        self.held: dict[str, Live] = {}
        self.most = 0

    def add(self, lives: Sequence[Live]) -> None:
        self.held.update((live.request.request_id, live) for live in lives)
        self.most = max(self.most, len(self.held))

    def remove(self, live: Live) -> None:
        self.held.pop(live.request.request_id, None)

    def end(self, name: str, error: Exception | None = None) -> None:
        reason = None if error else "length"
        self.held[name].put(TokenEvent(name, () if error else (7,), finish_reason=reason, error=error))


def test_each_sequence_that_ends_makes_room_for_the_next() -> None:
    async def run() -> None:
        trunks = Trunks()
        session = Session(trunks, requests(AT_ONCE + 50))
        seen = []
        while len(seen) < AT_ONCE + 50:
            assert len(trunks.held) == min(AT_ONCE, AT_ONCE + 50 - len(seen))
            trunks.end(next(iter(trunks.held)))
            told = await session.next(5)
            assert told is not None
            seen.append(told[0])
        assert seen == list(range(AT_ONCE + 50))
        assert trunks.most == AT_ONCE
        with pytest.raises(EngineError):
            await session.next(5)

    asyncio.run(run())


def test_a_full_queue_delays_what_others_of_the_request_make_room_for() -> None:
    async def run() -> None:
        trunks, full = Trunks(), Overloaded("1024 requests are waiting already")
        session = Session(trunks, requests(AT_ONCE + 2))
        trunks.end("r-0")
        assert await session.next(5) is not None
        trunks.end(f"r-{AT_ONCE}", full)  # sent when r-0 had ended
        trunks.end("r-1")
        told = await session.next(5)
        assert told is not None
        assert told[0] == 1, "the refusal is not told"
        assert f"r-{AT_ONCE}" in trunks.held, "it was sent again"
        trunks.end("r-2", full)  # one of the first: the request as a whole is refused
        told = await session.next(5)
        assert told is not None
        assert told[1].error is full
        session.close()
        assert trunks.held == {}

    asyncio.run(run())


def test_a_refusal_is_told_when_nothing_else_of_the_request_is_left() -> None:
    async def run() -> None:
        trunks = Trunks()
        session = Session(trunks, requests(AT_ONCE + 1))
        for i in range(AT_ONCE):
            trunks.end(f"r-{i}")
            assert await session.next(5) is not None
        trunks.end(f"r-{AT_ONCE}", Overloaded("full"))
        told = await session.next(5)
        assert told is not None
        assert isinstance(told[1].error, Overloaded)

    asyncio.run(run())


def test_silence_is_told_and_loses_no_event() -> None:
    async def run() -> None:
        trunks = Trunks()
        session = Session(trunks, requests(2))
        for _ in range(3):
            assert await session.next(0.01) is None
        trunks.end("r-1")
        assert (await session.next(0.01) or (None,))[0] == 1
        session.stop(0)
        session.stop(0)
        assert trunks.held == {}

    asyncio.run(run())


def test_what_a_trunk_refuses_names_the_field(trunk: Trunk) -> None:
    async def run() -> None:
        async with sessions_over([trunk.info]) as sessions:
            wrong = Request("r", (5,), SamplingParams(stop_token_ids=[600]))
            told = await sessions.open([(0, wrong)]).next(10)
            assert told is not None
            assert isinstance(told[1].error, InvalidRequest)
            assert told[1].error.param == "stop_token_ids"

    asyncio.run(run())


def test_the_search_goes_on_when_no_link_can_be_built(
    trunk: Trunk, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PEM files are unreadable at first, as while a secret is renewed."""
    files = TlsFiles(*(str(tmp_path / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    options = LinkOptions(tls=files)

    async def discover() -> list[TrunkInfo]:
        return [replace(trunk.info, replica_id="a"), replace(trunk.info, replica_id="b")]

    async def run() -> None:
        sessions = Sessions(discover, options, refresh_s=0.05)
        sessions.start()
        with pytest.raises(NotReady):
            await sessions.ensure_trunk(1.0)
        ours = [record for record in caplog.records if record.name.startswith("moe_ray.")]
        told = [record.getMessage() for record in ours if record.levelno == logging.ERROR]
        assert len(told) == 2, "once for each trunk, however often it is tried"
        assert all("cert.pem" in message for message in told)
        sessions._options = LinkOptions()  # the files are there now
        assert (await sessions.ensure_trunk(5)).replica_id == "a"
        answer = await sessions.open(requests(1)).next(10)
        assert answer is not None
        assert answer[1].error is None

    asyncio.run(run())


def test_the_search_goes_on_after_what_was_not_foreseen(trunk: Trunk, caplog: pytest.LogCaptureFixture) -> None:
    looks = iter([RuntimeError("a bad answer"), TypeError("another")])

    async def discover() -> list[TrunkInfo]:
        if (error := next(looks, None)) is not None:
            raise error
        return [trunk.info]

    async def run() -> None:
        sessions = Sessions(discover, LinkOptions())
        sessions.start()
        await sessions.ensure_trunk(10)

    asyncio.run(run())
    ours = [record for record in caplog.records if record.name.startswith("moe_ray.")]
    assert [record.exc_info[0] for record in ours if record.exc_info] == [RuntimeError, TypeError]


@pytest.mark.parametrize("side", ["_read", "_write"])
def test_a_stream_that_fails_on_one_side_is_built_anew(
    trunk: Trunk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Whichever side: the other must not go on as if requests still went through. What it had is replayed."""
    real, failed = getattr(TrunkLink, side), []

    async def fail_once(link: TrunkLink, stream: object) -> None:
        if not failed:
            failed.append(link)
            await asyncio.sleep(0.3)
            raise ValueError("a message that cannot be read")
        await real(link, stream)

    monkeypatch.setattr(TrunkLink, side, fail_once)

    async def run() -> None:
        async with sessions_over([trunk.info]) as sessions:
            session = sessions.open(requests(1))
            for _ in range(2):
                told = await session.next(10)
                assert told is not None
                assert told[1].error is None

    asyncio.run(run())
    assert failed
    assert "the stream to trunk trunk-1 failed" in caplog.text


def test_a_request_that_a_trunk_cannot_read_ends_alone(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_ray.trunk import server

    real = server.unpack_request

    def unpack(message: pb.Submit) -> Request:
        if message.request_id == "r-0":
            raise ValueError("cannot be read")
        return real(message)

    monkeypatch.setattr(server, "unpack_request", unpack)

    async def run() -> None:
        async with sessions_over([trunk.info]) as sessions:
            session, ended = sessions.open(requests(3)), {}
            while len(ended) < 3:
                told = await session.next(10)
                assert told is not None
                if told[1].last:
                    ended[told[0]] = told[1].error
            assert isinstance(ended.pop(0), EngineError)
            assert list(ended.values()) == [None, None]

    asyncio.run(run())
