"""What only the gRPC carrier has: token, TLS, peers that misbehave or freeze, ports, and a clean exit."""

from __future__ import annotations

import datetime
import ipaddress
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import echo_expert as echo
import grpc
import psutil
import pytest
import torch

from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import ConfigError, LinkBroken, WrongAnswer
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.transport import wire
from moe_ray.transport.base import LinkOptions, TlsFiles
from moe_ray.transport.grpc import GrpcExpertServer, GrpcLink
from moe_ray.transport.grpc_channel import TokenInterceptor
from moe_ray.transport.version import WIRE_VERSION

WAIT_S = 20.0


def make_call(expert: int = echo.ECHO, layer: int = 0) -> ExpertCall:
    return ExpertCall(layer, expert, torch.randn(2, 3), torch.rand(2))


def serve(request: pytest.FixtureRequest, options: LinkOptions | None = None) -> ReplicaInfo:
    server = GrpcExpertServer(echo.behave, options=options)
    request.addfinalizer(server.close)
    return echo.info({"grpc": server.address})


def assert_answers(link: GrpcLink) -> None:
    call = make_call()
    assert torch.equal(link.send(call).result(WAIT_S).rows, echo.weighted(call))


@pytest.mark.parametrize("shown", [None, "", "wrong", echo.TOKEN[:-1], echo.TOKEN + "x", echo.TOKEN.upper()])
def test_a_wrong_token_is_refused(request: pytest.FixtureRequest, shown: str | None) -> None:
    info = serve(request, LinkOptions(token=echo.TOKEN))
    with pytest.raises(LinkBroken, match=r"echo-1 .*: the replica refused the cluster token"):
        GrpcLink(info, LinkOptions(token=shown))
    link = GrpcLink(info, LinkOptions(token=echo.TOKEN))
    assert_answers(link)
    link.close()


def test_the_token_guards_unary_calls_too(request: pytest.FixtureRequest) -> None:
    class Trunk(pb_grpc.TrunkServicer):
        def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.TrunkStatus:
            return pb.TrunkStatus(ready=True)

    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(2), interceptors=[TokenInterceptor("t")])
    pb_grpc.add_TrunkServicer_to_server(Trunk(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    request.addfinalizer(lambda: server.stop(None).wait())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.TrunkStub(channel)
        assert stub.Info(pb.InfoRequest(), metadata=(("authorization", "Bearer t"),)).ready
        with pytest.raises(grpc.RpcError) as raised:
            stub.Info(pb.InfoRequest())
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("token", ["schlüssel", "two\nlines"])
def test_a_token_that_no_header_can_hold(token: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        GrpcExpertServer(echo.behave, options=LinkOptions(token=token))


def test_mutual_tls(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    ours, theirs = make_tls(tmp_path / "ours"), make_tls(tmp_path / "theirs")
    info = serve(request, LinkOptions(tls=ours, token=echo.TOKEN))
    link = GrpcLink(info, LinkOptions(tls=ours, token=echo.TOKEN))
    assert_answers(link)
    link.close()
    by_name = TlsFiles(ours.certificate, ours.key, ours.ca, server_name="moe-ray-expert")
    link = GrpcLink(info, LinkOptions(tls=by_name, token=echo.TOKEN))
    assert_answers(link)
    link.close()
    stranger_name = TlsFiles(ours.certificate, ours.key, ours.ca, server_name="somebody-else")
    stranger = TlsFiles(theirs.certificate, theirs.key, ours.ca)  # trusts the server, and is not trusted by it
    for tls in (None, theirs, stranger, stranger_name):
        started = time.monotonic()
        with pytest.raises(LinkBroken, match="echo-1"):
            GrpcLink(info, LinkOptions(tls=tls, token=echo.TOKEN, connect_timeout_s=2.0))
        assert time.monotonic() - started < 2.5
    with pytest.raises(ConfigError, match=r"tls\.key: cannot read .*nowhere"):
        GrpcLink(info, LinkOptions(tls=TlsFiles(ours.certificate, str(tmp_path / "nowhere"), ours.ca)))


def test_a_malformed_call_is_refused_and_the_stream_lives_on(request: pytest.FixtureRequest) -> None:
    info = serve(request)
    outgoing: queue.SimpleQueue[pb.ExpertCall | None] = queue.SimpleQueue()
    with grpc.insecure_channel(info.addresses["grpc"]) as channel:
        replies = pb_grpc.ExpertStub(channel).Forward(
            iter(outgoing.get, None), metadata=(("moe-ray-expert", str(WIRE_VERSION)),)
        )
        call = make_call()
        call.call_id = 5
        good, bad = wire.pack_call(call), wire.pack_call(call)
        bad.rows = bad.rows[:-1]
        for message, status in ((good, pb.OK), (bad, pb.REFUSED), (pb.ExpertCall(), pb.REFUSED), (good, pb.OK)):
            outgoing.put(message)
            reply = next(replies)
            assert (reply.header.status, reply.header.call_id) == (status, message.header.call_id)
            assert bool(reply.header.error) == (status != pb.OK)
        outgoing.put(None)


def serve_rogue(request: pytest.FixtureRequest, reply: Callable[[pb.ExpertCall], pb.ExpertReply]) -> ReplicaInfo:
    """A peer that speaks gRPC and shakes hands like an expert, and answers what `reply` says."""
    from concurrent.futures import ThreadPoolExecutor

    class Rogue(pb_grpc.ExpertServicer):
        def Forward(self, calls: Iterator[pb.ExpertCall], context: grpc.ServicerContext) -> Iterator[pb.ExpertReply]:
            context.send_initial_metadata((("moe-ray-expert", str(WIRE_VERSION)),))
            yield from map(reply, calls)

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_ExpertServicer_to_server(Rogue(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    request.addfinalizer(lambda: server.stop(None).wait())
    return echo.info({"grpc": f"127.0.0.1:{port}"})


def test_a_malformed_reply_is_never_used(request: pytest.FixtureRequest) -> None:
    def reply(message: pb.ExpertCall) -> pb.ExpertReply:
        header = pb.ExpertReplyHeader(call_id=message.header.call_id, num_rows=2, hidden_size=3, dtype=pb.FLOAT32)
        return pb.ExpertReply(header=header, rows=message.rows[: 23 if message.header.layer else 24])

    link = GrpcLink(serve_rogue(request, reply))
    with pytest.raises(WrongAnswer, match=r"echo-1.*rows has 23 bytes, expected 24"):
        link.send(make_call(layer=1)).result(WAIT_S)
    call = make_call()
    assert torch.equal(link.send(call).result(WAIT_S).rows, call.rows)
    link.close()


def test_a_reply_to_no_call_breaks_the_link(request: pytest.FixtureRequest) -> None:
    both_sent = threading.Event()

    def reply(message: pb.ExpertCall) -> pb.ExpertReply:
        both_sent.wait(WAIT_S)
        return pb.ExpertReply(header=pb.ExpertReplyHeader(call_id=77))

    link = GrpcLink(serve_rogue(request, reply))
    first, second = link.send(make_call()), link.send(make_call())
    both_sent.set()
    for pending in (first, second):
        with pytest.raises(LinkBroken, match="answered call 77, which is not in flight"):
            pending.result(WAIT_S)
    assert link.broken
    link.close()


def test_a_peer_that_is_no_expert(request: pytest.FixtureRequest) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    request.addfinalizer(lambda: server.stop(None).wait())
    with pytest.raises(LinkBroken, match="UNIMPLEMENTED"):
        GrpcLink(echo.info({"grpc": f"127.0.0.1:{port}"}))


def test_a_peer_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(LinkBroken, match=r"echo-1 .*no answer of a moe_ray expert within 0\.5 s"):
            GrpcLink(echo.info({"grpc": f"127.0.0.1:{silent.getsockname()[1]}"}), LinkOptions(connect_timeout_s=0.5))
        assert 0.4 < time.monotonic() - started < 1.5


def freeze(pid: int) -> None:
    """Stop a process, and wait until it is: it may go on for a moment after the signal was sent."""
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)


def test_a_frozen_peer_is_noticed_by_keepalive(expert_process: Callable[..., tuple[ReplicaInfo, int]]) -> None:
    info, pid = expert_process("grpc")
    link = GrpcLink(info, LinkOptions(keepalive_s=0.2))
    assert_answers(link)
    time.sleep(0.6)  # several pings: an answered one must not end the stream
    assert_answers(link)
    freeze(pid)  # its sockets stay open, as with a machine that lost its power
    pending = link.send(make_call())
    started = time.monotonic()
    with pytest.raises(LinkBroken):
        pending.result(WAIT_S)
    assert time.monotonic() - started < 3.0
    assert link.broken
    link.close()


def test_closing_the_server_breaks_its_links(request: pytest.FixtureRequest) -> None:
    server = GrpcExpertServer(echo.behave)
    info = echo.info({"grpc": server.address})
    links = [GrpcLink(info) for _ in range(3)]
    pending = [link.send(make_call(echo.SLOW, layer=1500)) for link in links]
    time.sleep(0.05)
    started = time.monotonic()
    server.close()
    server.close()
    for reply in pending:
        with pytest.raises(LinkBroken, match="echo-1"):
            reply.result(WAIT_S)
    assert time.monotonic() - started < 1.0
    for link in links:
        assert link.broken
        link.close()
    with pytest.raises(LinkBroken):
        GrpcLink(info)


def test_an_idle_link_knows_that_its_peer_died(expert_process: Callable[..., tuple[ReplicaInfo, int]]) -> None:
    info, pid = expert_process("grpc")
    link = GrpcLink(info)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not link.broken and time.monotonic() < deadline:
        time.sleep(0.005)
    assert link.broken
    link.close()


def test_a_taken_port_is_a_config_error() -> None:
    server = GrpcExpertServer(echo.behave)
    host, _, port = server.address.rpartition(":")
    with pytest.raises(ConfigError, match=f"cannot listen on {server.address}"):
        GrpcExpertServer(echo.behave, host, int(port))
    server.close()


def test_the_default_host_is_loopback_only() -> None:
    server = GrpcExpertServer(echo.behave)
    assert server.address.startswith("127.0.0.1:")
    server.close()


def test_forgetting_to_close_does_not_keep_a_process_alive() -> None:
    code = (
        "import echo_expert as echo, torch\n"
        "from moe_ray.transport.grpc import *\n"
        "server = GrpcExpertServer(echo.behave)\n"
        "link = GrpcLink(echo.info({'grpc': server.address}))\n"
        "link.send(ExpertCall(0, echo.ECHO, torch.ones(1, 1), torch.ones(1))).result(10)\n"
        "print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def make_tls(folder: Path) -> TlsFiles:
    """A certificate authority of its own and one certificate for both ends."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def build(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("moe-ray-expert"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    folder.mkdir()
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "ca.pem").write_bytes(build("ca", "ca", ca_key, ca_key))
    (folder / "cert.pem").write_bytes(build("peer", "ca", key, ca_key))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return TlsFiles(str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "ca.pem"))
