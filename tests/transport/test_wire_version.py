"""Peers of another wire version are told both in one line, over every carrier; adapters are refused by number."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import echo_expert as echo
import grpc
import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import AdapterRows, ExpertCall, WeightLayout
from moe_ray.errors import AdapterNotHeld, InvalidCall, LinkBroken
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.expert import ExpertFFN
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.pb import moe_ray_pb2_grpc as pb_grpc
from moe_ray.transport import connect, handshake
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.grpc import GrpcExpertServer
from moe_ray.transport.socket import SocketExpertServer
from moe_ray.transport.version import WIRE_VERSION
from moe_ray.transport.weight_transfer import WeightsLink, WeightsServer

SAYS = rf"it speaks wire version 1, this process {WIRE_VERSION}$"
NATIVE = {False: LinkOptions(), True: LinkOptions(native_dir=load_config().cache_dir)}


@contextlib.contextmanager
def port_that_says(hello: bytes) -> Iterator[str]:
    """A TCP port whose every connection is greeted so."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.sendall(hello + bytes(32))

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]},"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_the_greeting_has_name_and_version() -> None:
    for service in (handshake.CALLS, handshake.WEIGHTS):
        assert len(service.hello) == 16
        assert service.hello.endswith(str(WIRE_VERSION).encode())


@pytest.mark.parametrize("native", [False, True])
def test_socket(native: bool) -> None:
    with port_that_says(b"moe-ray-expert-1") as address, pytest.raises(LinkBroken, match=rf"echo-1 at .*: {SAYS}"):
        connect("socket", echo.info({"socket": address}), NATIVE[native])


def test_socket_of_something_else() -> None:
    with port_that_says(b"SSH-2.0-OpenSSH_") as address, pytest.raises(LinkBroken, match=r"is not a moe_ray expert$"):
        connect("socket", echo.info({"socket": address}))


def test_weights() -> None:
    with port_that_says(b"moe-ray-weight-1") as address, pytest.raises(LinkBroken, match=SAYS):
        WeightsLink(address)


class OldServicer(pb_grpc.ExpertServicer):
    """What a replica of wire version 1 says first."""

    def Forward(self, calls: Iterator[pb.ExpertCall], context: grpc.ServicerContext) -> Iterator[pb.ExpertReply]:
        context.send_initial_metadata((("moe-ray-expert", "1"),))
        yield from ()


def test_grpc_replica_of_another_version(request: pytest.FixtureRequest) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_ExpertServicer_to_server(OldServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    request.addfinalizer(lambda: server.stop(None).wait())
    with pytest.raises(LinkBroken, match=rf"echo-1 at .*: {SAYS}"):
        connect("grpc", echo.info({"grpc": f"127.0.0.1:{port}"}))


@pytest.mark.parametrize("metadata", [(), (("moe-ray-expert", "1"),)])
def test_grpc_trunk_of_another_version(request: pytest.FixtureRequest, metadata: tuple[tuple[str, str], ...]) -> None:
    server = GrpcExpertServer(echo.behave)
    request.addfinalizer(server.close)
    with grpc.insecure_channel(server.address) as channel:
        stream = pb_grpc.ExpertStub(channel).Forward(iter(()), metadata=metadata)
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
    assert refused.value.details() == (  # type: ignore[attr-defined]
        f"the trunk speaks wire version 1, this replica {WIRE_VERSION}"
    )


class OldActor(echo.EchoActor):
    """An actor whose process answers as one of wire version 1 does."""

    def __init__(self) -> None:
        from moe_ray.transport import ray

        ray._is_serving.__globals__["WIRE_VERSION"] = True
        super().__init__()


@pytest.mark.usefixtures("ray_cluster")
def test_ray(request: pytest.FixtureRequest) -> None:
    import sys

    import ray

    for module in (echo, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)  # workers do not have this directory on their path
    actor = ray.remote(OldActor).options(name=f"old-{uuid.uuid4().hex}", namespace="experts", num_cpus=0).remote()
    request.addfinalizer(lambda: ray.kill(actor))
    address, _ = ray.get(actor.endpoint.remote(), timeout=30)
    with pytest.raises(LinkBroken, match=rf"echo-1 at .*: {SAYS}"):
        connect("ray", echo.info({"ray": address}))


# ---- adapters


@pytest.fixture(scope="module")
def worker() -> ExpertWorker:
    ffn = ExpertFFN({(0, 0): TorchFFN(*(torch.ones(8, 8) for _ in range(3)), "silu")})
    return ExpertWorker(ffn, 8, Compute(Backend("float32")))


def adapted(adapter_id: int) -> ExpertCall:
    return ExpertCall(0, 0, torch.ones(2, 8), torch.ones(2), adapters=(AdapterRows(0, 1), AdapterRows(adapter_id, 1)))


@pytest.mark.parametrize("carrier", ["socket", "grpc"])
def test_an_adapter_that_a_replica_does_not_know_is_refused(worker: ExpertWorker, carrier: str) -> None:
    server = {"socket": SocketExpertServer, "grpc": GrpcExpertServer}[carrier](worker.forward)
    link = connect(carrier, echo.info({carrier: server.address}))
    with pytest.raises(AdapterNotHeld, match="adapter 7 is not held by this replica"):
        link.send(adapted(7)).result(20)
    with pytest.raises(AdapterNotHeld, match=f"adapter {2**64 - 1} is not held"):
        link.send(adapted(2**64 - 1)).result(20)
    assert link.send(adapted(0)).result(20).rows.shape == (2, 8)
    for wrong in (-1, 2**64):
        with pytest.raises(InvalidCall, match="adapter_id is"):
            link.send(adapted(wrong))
    link.close()
    server.close()


def test_weights_of_an_adapter_are_refused() -> None:
    layout = WeightLayout("float", "packed", "float32", (8, 8))
    server = WeightsServer(lambda *_: [])
    sock = handshake.connect(server.address, LinkOptions(), handshake.WEIGHTS)
    from moe_ray.transport.frames import FrameStream
    from moe_ray.transport.weight_transfer import pack_layout

    stream = FrameStream(sock)
    stream.write_frame(pb.WeightsRequest(layout=pack_layout(layout), adapter_id=3), (), 5.0, None)
    stream.wait_frame(None)
    reply = pb.WeightsReply.FromString(stream.read_header(5.0))
    assert (reply.status, reply.error) == (pb.REFUSED, "adapter 3 is asked for, and this replica knows no adapters")
    stream.write_frame(pb.WeightsRequest(), (), 5.0, None)
    stream.wait_frame(None)
    reply = pb.WeightsReply.FromString(stream.read_header(5.0))
    assert reply.status == pb.REFUSED
    assert "layout.shape is []" in reply.error
    sock.close()
    server.close()
