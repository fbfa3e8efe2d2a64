"""What only the `socket` carrier promises: the token without showing it, Unix or TCP, no deadlock, hostile peers."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import echo_expert as echo
import pytest
import torch

from moe_ray.core import ExpertCall
from moe_ray.errors import ConfigError, LinkBroken
from moe_ray.transport.base import LinkOptions, TlsFiles
from moe_ray.transport.socket import SocketExpertServer, SocketLink

OPTIONS = LinkOptions(token=echo.TOKEN, connect_timeout_s=3.0)


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


@pytest.mark.parametrize("shown", ["wrong", "", None])
def test_a_wrong_token_is_refused(server: SocketExpertServer, shown: str | None) -> None:
    with pytest.raises(LinkBroken, match="refused the cluster token"):
        link_to(server.address, LinkOptions(token=shown))


def test_an_impostor_without_the_token_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            peer, _ = listener.accept()
            peer.sendall(b"moe-ray-expert-1" + bytes(32))
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


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_large_calls_in_flight_do_not_deadlock(server: SocketExpertServer, way: str) -> None:
    link = link_to(server.address if way == "unix" else server.address.split(",")[0] + ",")
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
