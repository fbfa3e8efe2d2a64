"""The port on which a gateway takes HTTP itself: no proxy of Serve is in the way of its tokens."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from moe_ray.config.gateway import Listen
from moe_ray.errors import ConfigError

logger = logging.getLogger(__name__)

BIND_WITHIN_S: Final = 30.0
"""How long the port may be in use: by a gateway before this one, which hangs and is being ended."""
_BACKLOG: Final = 2048


class OwnPort:
    """An HTTP application that listens, on the loop that `open` was called on."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server, self._serving = server, serving

    @classmethod
    async def open(cls, app: ASGIApp, listen: Listen) -> OwnPort:
        """Listen. Raises `ConfigError` where the address cannot be had, or the port is still in use after a while."""
        listening = await _bound(listen)
        # Logging is the process's own, and a request is logged by the application, with its id.
        settings = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
        )
        server = uvicorn.Server(settings)
        return cls(server, asyncio.create_task(server.serve([listening]), name="http"))

    def close(self) -> None:
        """Take no more requests. From any thread; what is being answered goes on."""
        self._server.should_exit = True


async def _bound(listen: Listen) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + BIND_WITHIN_S
    while True:
        try:
            return socket.create_server(
                (listen.host, listen.port),
                family=socket.AF_INET6 if ":" in listen.host else socket.AF_INET,
                backlog=_BACKLOG,
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE or loop.time() > deadline:
                raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}") from error
        logger.warning("%s is in use; trying again", listen)
        await asyncio.sleep(1)
