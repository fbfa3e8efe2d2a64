"""What only the `socket` carrier promises: the token without showing it, Unix or TCP, no deadlock, hostile peers."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import echo_expert as echo
import pytest
import torch
from google.protobuf.message import Message

from moe_ray.config import load_config
from moe_ray.core import ExpertCall
from moe_ray.errors import ConfigError, LinkBroken
from moe_ray.native.links import Links
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import connect
from moe_ray.transport.base import CallBatch, Link, LinkOptions, TlsFiles
from moe_ray.transport.handshake import CALLS, welcome
from moe_ray.transport.handshake import connect as shake_hands
from moe_ray.transport.listener import Listener
from moe_ray.transport.native_socket import NativeSocketLink, links_library
from moe_ray.transport.socket import SocketExpertServer, SocketLink

OPTIONS = LinkOptions(token=echo.TOKEN, connect_timeout_s=3.0)


CACHE = load_config().cache_dir


def frame(header: Message) -> bytes:
    packed = header.SerializeToString()
    return struct.pack("<I", len(packed)) + packed


@contextlib.contextmanager
def replica_that(answers: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a replica that knows the token and does this, once, when it is called; then it hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with welcome(listener.accept()[0], None, OPTIONS) as peer:
                peer.recv(1 << 16)
                answers(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]},"
        thread.join()


@pytest.fixture
def server() -> Iterator[SocketExpertServer]:
    server = SocketExpertServer(echo.behave, options=OPTIONS)
    yield server
    server.close()
    server.close()


def make_call(rows: int = 3, seed: int = 0, hidden: int = 8) -> ExpertCall:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, generator=generator)
    return ExpertCall(3, echo.ECHO, torch.randn((rows, hidden), generator=generator), weights)


def assert_answers(link: SocketLink) -> None:
    call = make_call()
    assert torch.equal(link.send(call).result(10).rows, echo.weighted(call))


def link_to(address: str, options: LinkOptions = OPTIONS) -> SocketLink:
    return SocketLink(echo.info({"socket": address}), options)


def native_link_to(address: str) -> Link:
    options = replace(OPTIONS, native_dir=CACHE)
    if links_library(CACHE) is None:
        pytest.skip("the native library cannot be built here")
    link = connect("socket", echo.info({"socket": address}), options)
    assert isinstance(link, NativeSocketLink)
    return link


def test_links_that_are_made_at_once_are_sent_on_together(tmp_path: Path) -> None:
    """Those of one library are one group; a trunk connects to its experts from as many threads."""
    (tmp_path / "native").symlink_to(CACHE / "native")  # as of a process that has loaded nothing yet
    if links_library(CACHE) is None:
        pytest.skip("the native library cannot be built here")
    begin = threading.Barrier(8)

    def load(_: int) -> Links | None:
        begin.wait()
        return links_library(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load, range(8)))
    assert all(library is found[0] for library in found)


@pytest.mark.parametrize("shown", ["wrong", "", None])
def test_a_wrong_token_is_refused(server: SocketExpertServer, shown: str | None) -> None:
    with pytest.raises(LinkBroken, match="refused the cluster token"):
        link_to(server.address, LinkOptions(token=shown))


def test_an_impostor_without_the_token_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            peer, _ = listener.accept()
            peer.sendall(CALLS.hello + bytes(32))
            peer.recv(64)
            peer.sendall(b"ok" + bytes(32))
            peer.recv(1)

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(LinkBroken, match="does not know the cluster token"):
            link_to(f"127.0.0.1:{listener.getsockname()[1]},")


def test_a_unix_socket_on_one_machine_and_tcp_without_it(server: SocketExpertServer) -> None:
    where, name = server.address.split(",")
    assert_answers(link_to(server.address))
    assert_answers(link_to(f"{where},"))
    assert_answers(link_to(f"{where},{name}-of-another-machine"))
    assert_answers(link_to(f"127.0.0.1:1,{name}"))  # TCP is not even tried


@pytest.mark.parametrize("make", [link_to, native_link_to])
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_large_calls_in_flight_do_not_deadlock(
    server: SocketExpertServer, way: str, make: Callable[[str], Link]
) -> None:
    link = make(server.address if way == "unix" else server.address.split(",")[0] + ",")
    calls = [make_call(rows=2048, seed=seed, hidden=1024) for seed in range(6)]  # 8 MiB each way, far above any buffer
    pending = [link.send(call) for call in calls]
    for call, reply in reversed(list(zip(calls, pending, strict=True))):
        assert torch.equal(reply.result(20).rows, echo.weighted(call))
    link.close()


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack("<I", 3) + b"\xff\xff\xff", b"\x05"])
def test_garbage_ends_that_connection_alone(server: SocketExpertServer, garbage: bytes) -> None:
    healthy = link_to(server.address)
    rude = link_to(server.address)
    rude._stream.write([garbage], 5, None)
    rude._stream._sock.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkBroken):
        rude.send(make_call()).result(5)
    assert_answers(healthy)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"\xff\xff\xff\xff", "a header of 4294967295 bytes"),
        (struct.pack("<I", 3) + b"\xff\xff\xff", "ends within"),
        (frame(pb.ExpertReplyHeader(call_id=99, num_rows=3, hidden_size=8, dtype=pb.FLOAT32)), "not in flight"),
        (frame(pb.ExpertReplyHeader(call_id=1, num_rows=3, hidden_size=8, dtype=9)), "dtype is 9"),
        (frame(pb.ExpertReplyHeader(call_id=1, num_rows=1 << 31, hidden_size=1 << 31, dtype=pb.FLOAT32)), "num_rows"),
        (b"\x05", "ended the connection"),
    ],
)
def test_a_replica_that_speaks_garbage(answer: bytes, says: str) -> None:
    def reply(peer: socket.socket) -> None:
        peer.sendall(answer)

    with replica_that(reply) as address:
        link = native_link_to(address)
        with pytest.raises(LinkBroken, match=says):
            link.send(make_call()).result(10)
        assert link.broken
        with pytest.raises(LinkBroken, match=says):
            link.send(make_call())


def test_replies_in_pieces_and_unknown_fields() -> None:
    """A replica of a later version, behind a network that delivers byte by byte."""
    rows = torch.randn(2, 8)
    header = pb.ExpertReplyHeader(call_id=1, num_rows=2, hidden_size=8, dtype=pb.FLOAT32, queued_rows=300)
    packed = header.SerializeToString() + b"\x98\x06\x01" + b"\xa2\x06\x02hi" + b"\xa9\x06" + bytes(8)
    message = struct.pack("<I", len(packed)) + packed + rows.numpy().tobytes()

    def reply(peer: socket.socket) -> None:
        for byte in message:
            peer.sendall(bytes([byte]))

    with replica_that(reply) as address:
        link = native_link_to(address)
        got = link.send(make_call(rows=2)).result(10)
        assert torch.equal(got.rows, rows)
        assert got.load.queued_rows == 300


def test_a_forgotten_reply_is_not_written_to_memory_that_is_gone(server: SocketExpertServer) -> None:
    link = native_link_to(server.address)
    for _ in range(5):
        late = ExpertCall(100, echo.SLOW, torch.randn(64, 512), torch.rand(64))
        batch = CallBatch(late.layer, [late.expert], [64], late.rows, late.weights)
        replies = link.group.scatter([link], batch)
        target = replies.rows()
        target.fill_(7.0)
        replies.forget()
        call = make_call(rows=64, hidden=512)
        assert torch.equal(link.send(call).result(10).rows, echo.weighted(call))
        assert bool((target == 7.0).all())


def test_closing_the_server_breaks_its_links() -> None:
    server = SocketExpertServer(echo.behave, options=OPTIONS)
    link = link_to(server.address)
    assert_answers(link)
    server.close()
    with pytest.raises(LinkBroken):
        link.send(make_call()).result(5)
    assert link.broken
    with pytest.raises(LinkBroken):
        link_to(server.address)


def test_a_connection_in_use_keeps_its_descriptor_until_its_thread_is_done() -> None:
    """Native threads know a connection by its number: closed under them, it would soon be another file's."""
    used, go_on, numbers = threading.Event(), threading.Event(), list[int]()

    def serve(sock: socket.socket) -> None:
        number = sock.fileno()
        used.set()
        assert go_on.wait(20)
        numbers.extend([number, sock.fileno()])
        used.set()

    listener = Listener(serve, "127.0.0.1", 0, OPTIONS)
    sock = shake_hands(listener.address, OPTIONS)
    assert used.wait(20)
    used.clear()
    listener.close()
    assert sock.recv(1) == b"", "the peer is told at once"
    go_on.set()
    assert used.wait(20)
    assert numbers[0] == numbers[1] >= 0
    sock.close()


def test_a_taken_port_is_a_config_error(server: SocketExpertServer) -> None:
    port = int(server.address.split(",")[0].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        SocketExpertServer(echo.behave, port=port)


def test_mutual_tls(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("ours", "strangers"):
        subject = ("-subj", "/CN=experts", "-addext", "subjectAltName=DNS:experts")
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-keyout", f"{name}.key", "-out", f"{name}.pem", *subject,
        )  # fmt: skip

    def options(name: str) -> LinkOptions:
        certificate, key = str(tmp_path / f"{name}.pem"), str(tmp_path / f"{name}.key")
        return LinkOptions(token="t", tls=TlsFiles(certificate, key, certificate, server_name="experts"))

    server = SocketExpertServer(echo.behave, options=options("ours"))
    tcp = server.address.split(",")[0] + ","
    link = link_to(tcp, options("ours"))
    assert_answers(link)
    calls = [make_call(rows=1024, seed=seed, hidden=1024) for seed in range(3)]
    for call, reply in [(call, link.send(call)) for call in calls]:
        assert torch.equal(reply.result(20).rows, echo.weighted(call))
    for wrong in (options("strangers"), LinkOptions(token="t", connect_timeout_s=1.0)):
        with pytest.raises(LinkBroken):
            link_to(tcp, wrong)
    server.close()
    with pytest.raises(LinkBroken):
        link.send(make_call()).result(5)
