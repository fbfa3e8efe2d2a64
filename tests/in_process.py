"""A trunk and a gateway in this process, without Ray: the real engine, the real stream between them, real HTTP."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from moe_ray.api.http import build_app
from moe_ray.api.observation import Observation
from moe_ray.api.page.house import House
from moe_ray.api.responses.memory import ResponseStore
from moe_ray.api.service import HttpOptions, ServedModel
from moe_ray.config import load_config
from moe_ray.core import TokenEvent, TrunkInfo
from moe_ray.deploy.load_overview import overview
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.local import local_experts
from moe_ray.gateway.sessions import Sessions
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.observe.tracing import Tracing
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.vocabulary import token_bytes_of
from moe_ray.transport.base import LinkOptions
from moe_ray.trunk.runtime import TrunkPlace, TrunkRuntime

LOAD: dict[str, Any] = overview({})
"""What GET /experts answers."""


class Trunk:
    """A trunk of one checkpoint."""

    def __init__(self, directory: Path, tracing: Tracing | None = None, **engine: Any) -> None:
        torch.set_num_threads(1)
        config = load_config({"model": {"dtype": "float32"}, "engine": {"kv_cache_gib": 0.05, **engine}})
        checkpoint = Checkpoint.open(directory)
        experts: list[ExpertDispatcher] = []

        def make_experts(compute: Compute) -> ExpertDispatcher:
            experts.append(local_experts(checkpoint, compute))
            return experts[0]

        vocabulary = partial(token_bytes_of, directory)
        self.engine = Paused(build_engine(config, checkpoint, make_experts, token_bytes=vocabulary))
        checkpoint.close()
        place = TrunkPlace("trunk-1", "node", "127.0.0.1")
        self.runtime = TrunkRuntime(
            self.engine,  # type: ignore[arg-type]
            experts[0],
            place,
            LinkOptions(),
            affinity=True,
            tracing=tracing,
        )
        self.info = self.runtime.info

    def close(self) -> None:
        self.runtime.close(drain_s=0)


class Paused:
    """An engine whose steps last longer, or fail."""

    def __init__(self, engine: Engine) -> None:
        self.pause_s = 0.0
        """Further seconds of each step."""
        self.error: Exception | None = None
        """What each step ends its sequences with."""
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[TokenEvent]:
        time.sleep(self.pause_s)
        events = self._engine.step()
        if self.error is None:
            return events
        for event in events:
            self._engine.abort(event.request_id)
        return [TokenEvent(event.request_id, error=self.error) for event in events]


@contextlib.asynccontextmanager
async def sessions_over(trunks: Sequence[TrunkInfo]) -> AsyncIterator[Sessions]:
    """A gateway's sessions, once they have found the trunks."""

    async def discover() -> Sequence[TrunkInfo]:
        return trunks

    sessions = Sessions(discover, LinkOptions(), deadline_s=5)
    sessions.start()
    if trunks:
        await sessions.ensure_trunk(10)
    yield sessions


@contextlib.contextmanager
def served_beside(directory: Path, trunks: Sequence[TrunkInfo], **more: Any) -> Iterator[str]:
    """URL of a gateway as `served` makes it, on a thread of its own: for clients that block."""
    ready: concurrent.futures.Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = concurrent.futures.Future()

    async def serve() -> None:
        async with served(directory, trunks, **more) as client:
            stop = asyncio.Event()
            ready.set_result((str(client.base_url).rstrip("/"), asyncio.get_running_loop(), stop))
            await stop.wait()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(asyncio.run, serve())
        serving.add_done_callback(
            lambda done: ready.done() or ready.set_exception(done.exception() or AssertionError())
        )
        url, loop, stop = ready.result(60)
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(stop.set)
            serving.result(60)


tokenizer_of = functools.cache(Tokenizer)
"""A tokenizer takes a second to load, and is never changed."""


@contextlib.asynccontextmanager
async def served(
    directory: Path,
    trunks: Sequence[TrunkInfo],
    options: HttpOptions | None = None,
    vocab_size: int | None = None,
    aliases: Sequence[str] = (),
    tracing: Tracing | None = None,
    responses: ResponseStore | None = None,
    house: House | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway over `trunks`. `vocab_size`: what the gateway takes for the vocabulary."""
    tokenizer = copy.copy(tokenizer_of(directory))
    tokenizer.vocab_size = vocab_size or tokenizer.vocab_size

    async def load() -> dict[str, Any]:
        return LOAD

    async with sessions_over(trunks) as sessions:
        observation = Observation("random", tracing)
        model = ServedModel("random", tokenizer, sessions, options, aliases, observation, responses)
        app = build_app(model, load, house)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            serving = asyncio.create_task(server.serve([listening]))
            while not server.started:
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                yield client
            server.should_exit = True
            await serving
