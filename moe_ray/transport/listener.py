"""A listening port and its Unix socket: each connection that proves the token is served by a thread of its own."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable

from moe_ray.errors import ConfigError, ProtocolError
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.handshake import ABSTRACT_UNIX, CALLS, PortKind, tls_context, welcome


class Listener:
    """Listens on host:port and on a Unix socket until `close`."""

    def __init__(
        self,
        serve: Callable[[socket.socket], None],
        host: str,
        port: int,
        options: LinkOptions,
        service: PortKind = CALLS,
        name: str = "expert",
    ) -> None:
        """`serve` has a connection to itself; it ends when it returns, or raises what ends one. Raises `ConfigError`.

        `name` is that of the threads.
        """
        self._serve_one, self._options, self._service, self._name = serve, options, service, name
        self._tls = tls_context(options, server=True)
        unix = f"moe-ray-{secrets.token_hex(8)}"
        self._connections: set[socket.socket] = set()
        self._closed = False
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            tcp = socket.create_server((host, port), family=family, backlog=64)
            self._listeners = [tcp]
            if ABSTRACT_UNIX:
                local = socket.socket(socket.AF_UNIX)
                local.bind(f"\0{unix}")
                local.listen(64)
                self._listeners.append(local)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        bound_host, bound_port = tcp.getsockname()[:2]
        self.address = f"{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port},{unix}"
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name=f"{name}-accept", daemon=True).start()

    def close(self) -> None:
        """Stop listening and end every connection at once. Idempotent."""
        self._closed = True
        for sock in (*self._listeners, *list(self._connections)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for listener in self._listeners:
            listener.close()
        # Connections are closed by the threads that serve them: some use the descriptor's number without the
        # interpreter, and a number that is free is at once another file's.

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.05)  # out of file descriptors, say: others may end
                continue
            self._connections.add(connection)
            name = f"{self._name}-connection"
            threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        sock = connection
        try:
            sock = welcome(connection, self._tls, self._options, self._service)
            self._connections.add(sock)  # another object, if TLS took the connection over
            if not self._closed:
                self._serve_one(sock)
        except (OSError, EOFError, ProtocolError):
            pass  # the peer is gone, or sends something else than frames: its connection ends, others go on
        finally:
            self._connections -= {connection, sock}
            sock.close()
