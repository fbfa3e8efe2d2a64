"""A replica that sends every row back as it came: one process with a real server of each carrier and a bare socket."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moe_ray.bench.child import Parent, answer_commands
from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import KernelsUnavailable
from moe_ray.native.host import Host
from moe_ray.transport.base import ExpertServer, LinkOptions

SIZE = struct.Struct("<I")
"""What a raw connection begins with: the bytes of each message on it."""


def echo(call: ExpertCall) -> ExpertReply:
    """The handler."""
    return ExpertReply(call.call_id, call.rows)


def listen(carrier: str, options: LinkOptions) -> ExpertServer:
    """Open the carrier's server in this process, on loopback."""
    if carrier == "socket":
        from moe_ray.transport.socket import SocketExpertServer

        return SocketExpertServer(echo, options=options, native=native_echo(options))
    if carrier == "grpc":
        from moe_ray.transport.grpc import GrpcExpertServer

        return GrpcExpertServer(echo, options=options)
    from moe_ray.transport.ray import RayExpertServer

    return RayExpertServer(echo)


def native_echo(options: LinkOptions) -> Host | None:
    """What answers sockets without the interpreter, as an expert's does."""
    try:
        return None if options.native_dir is None else Host.echo(options.native_dir)
    except KernelsUnavailable:
        return None


def replica(name: str, pid: int, addresses: dict[str, str]) -> ReplicaInfo:
    """What a link is opened with."""
    return ReplicaInfo(name, "local", pid, frozenset({(0, 0)}), 0, "bfloat16", addresses)


class RawEchoServer:
    """The floor: blocking sockets, a thread per connection, whole messages of one size, no header and no tensor."""

    def __init__(self, unix: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX) if unix else socket.create_server(("127.0.0.1", 0))
        if unix:
            self._listener.bind("")  # Linux chooses a free abstract name
            self._listener.listen()
        name = self._listener.getsockname()
        self.address = name[1:].decode() if unix else f"{name[0]}:{name[1]}"
        threading.Thread(target=self._accept, name="raw-accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._echo, args=(connection,), name="raw-echo", daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            (size,) = SIZE.unpack(connection.recv(SIZE.size, socket.MSG_WAITALL))
            message = memoryview(bytearray(size))
            while receive(connection, message):
                connection.sendall(message)


def receive(sock: socket.socket, message: memoryview) -> bool:
    """Fill `message` from a blocking socket; False if the peer has ended the connection."""
    filled = 0
    while filled < len(message):
        count = sock.recv_into(message[filled:])
        if count == 0:
            return False
        filled += count
    return True


class EchoActor:
    """The same replica as a Ray actor."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._server = listen("ray", LinkOptions())

    def endpoint(self) -> tuple[int, str]:
        return os.getpid(), self._server.address


def main() -> None:
    """Answer `open`: listen and say where."""
    torch.set_num_threads(1)
    servers: dict[str, Any] = {}

    def open_ports(carriers: Iterable[str], raw: Iterable[str], token: str, native_dir: str) -> dict[str, Any]:
        servers.update(
            {carrier: listen(carrier, LinkOptions(token=token, native_dir=Path(native_dir))) for carrier in carriers}
        )
        servers.update({f"raw {path}": RawEchoServer(path == "unix") for path in raw})
        return {name: server.address for name, server in servers.items()}

    answer_commands(Parent(), {"open": open_ports})


if __name__ == "__main__":
    main()
