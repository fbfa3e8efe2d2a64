"""A gateway whose loop runs on a thread of its own: for client libraries that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from in_process import served

from moe_ray.api.service import HttpOptions
from moe_ray.core import TrunkInfo


@contextlib.contextmanager
def served_at(directory: Path, trunks: Sequence[TrunkInfo], options: HttpOptions | None = None) -> Iterator[str]:
    """The URL of a gateway over `trunks`, until the block ends."""
    ready, end = threading.Event(), asyncio.Event()
    url: list[str] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with served(directory, trunks, options) as client:
            url.append(str(client.base_url).rstrip("/"))
            ready.set()
            await end.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    ready.wait()
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
