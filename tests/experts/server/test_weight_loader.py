"""Replicas that serve while they load: what is there is served, what comes is the same whichever way it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from backends import open_backend
from random_mixtral import save_random_mixtral

from moe_ray.config import load_config
from moe_ray.core import ExpertCall, ExpertKey, ReplicaInfo
from moe_ray.errors import CallRefused, CheckpointError, NotReady
from moe_ray.experts.client.replica_table import ReplicaTable
from moe_ray.experts.server.load_counters import KeyLoad
from moe_ray.experts.server.weight_loader import CARRIER, FasterSource, WeightLoader, peer_of
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.expert import FFN
from moe_ray.model.expert_reader import ExpertReader, read_experts
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import connect
from moe_ray.transport.base import ExpertServer, LinkOptions
from moe_ray.transport.frames import FrameStream
from moe_ray.transport.handshake import WEIGHTS
from moe_ray.transport.listener import Listener
from moe_ray.transport.socket import SocketExpertServer
from moe_ray.transport.weight_transfer import WeightsServer

WIDTH, INNER, LAYERS, EXPERT = 64, 96, 6, 1
KEYS = frozenset((layer, EXPERT) for layer in range(LAYERS))
KEY_BYTES = 3 * WIDTH * INNER
OPTIONS = LinkOptions(token="t", native_dir=load_config().cache_dir)
SOON_S = 20.0


def make_model(directory: Path, seed: int) -> Path:
    return save_random_mixtral(
        directory,
        seed=seed,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module", params=["torch", "native", "triton"])
def compute(request: pytest.FixtureRequest) -> Compute:
    if request.param == "torch":
        return Compute(Backend("float32"))
    return open_backend({"native": "native bfloat16", "triton": "triton float32"}[request.param])


class Reader(ExpertReader):
    """Reads the checkpoint when it is let."""

    def __init__(
        self,
        model: Path,
        compute: Compute,
        progress: Callable[[int, int], None] | None = None,
        quantize: str | None = None,
    ) -> None:
        super().__init__(Checkpoint.open(model), KEYS, compute, progress, quantize)
        self.let = threading.Semaphore(1)  # the constructor's layer
        self.before: Callable[[ExpertKey], None] = lambda key: None

    def let_all(self) -> Reader:
        self.let.release(LAYERS)
        return self

    def read(self, key: ExpertKey) -> FFN:
        assert self.let.acquire(timeout=SOON_S)
        self.before(key)
        return super().read(key)


@dataclass(eq=False)
class Replica:
    """What `serve.expert.ExpertReplica` is made of, without Ray."""

    name: str
    arrival: WeightLoader
    servers: dict[str, ExpertServer]

    @staticmethod
    def of(name: str, reader: ExpertReader, compute: Compute) -> Replica:
        arrival = WeightLoader(name, reader, WIDTH, compute, load_config().cache_dir)
        worker = arrival.worker
        calls = SocketExpertServer(worker.forward, options=OPTIONS, native=worker.native)
        return Replica(name, arrival, {"socket": calls, CARRIER: WeightsServer(arrival.offer, options=OPTIONS)})

    def info(self) -> ReplicaInfo:
        addresses = {carrier: server.address for carrier, server in self.servers.items()}
        loading = self.arrival.loading
        return ReplicaInfo(self.name, "n", 1, self.arrival.worker.keys, WIDTH, "float32", addresses, loading=loading)

    def start(self, peers: Sequence[ReplicaInfo] = (), done: bool = False) -> Replica:
        self.arrival.start(lambda: peers, self.name, "n", OPTIONS)
        assert not done or self.arrival.wait(SOON_S)
        return self

    def close(self) -> None:
        self.arrival.close()
        for server in self.servers.values():
            server.close()


@pytest.fixture
def replica(compute: Compute) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(reader: ExpertReader) -> Replica:
        made.append(Replica.of(f"replica-{len(made)}", reader, compute))
        return made[-1]

    yield make
    for each in made:
        each.close()


def call(layer: int, compute: Compute, rows: int = 5) -> ExpertCall:
    generator = torch.Generator().manual_seed(layer)
    tensor = torch.randn(rows, WIDTH, generator=generator).to(compute.torch_dtype)
    return ExpertCall(layer, EXPERT, tensor, torch.rand(rows, generator=generator))


def whole(model: Path, compute: Compute, quantize: str | None = None) -> list[torch.Tensor]:
    """What a replica that has loaded everything answers, by layer."""
    ffn = read_experts(Checkpoint.open(model), KEYS, compute, quantize=quantize)
    return [ffn.forward((layer, EXPERT), asked.rows, asked.weights) for layer, asked in calls(compute)]


def calls(compute: Compute) -> list[tuple[int, ExpertCall]]:
    return [(layer, call(layer, compute)) for layer in range(LAYERS)]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.005)


def test_what_is_there_is_served_while_the_rest_comes(
    replica: Callable[..., Replica], model: Path, compute: Compute
) -> None:
    wanted, reports = whole(model, compute), list[tuple[int, int]]()
    reader = Reader(model, compute, lambda *report: reports.append(report))
    new = replica(reader).start()
    worker = new.arrival.worker
    assert worker.keys == {(0, EXPERT)}
    assert worker.key_loads() == dict.fromkeys(KEYS, KeyLoad()), "counted from the start, whatever is loaded"
    link = connect("socket", new.info(), OPTIONS)
    failures: list[str] = []
    ended = threading.Event()

    def trunk() -> None:
        own = connect("socket", new.info(), OPTIONS)
        while not ended.is_set():
            for layer, _ in sorted(worker.keys):
                if not torch.equal(own.send(call(layer, compute)).result(SOON_S).rows, wanted[layer]):
                    failures.append(f"layer {layer}")
        own.close()

    trunks = [threading.Thread(target=trunk) for _ in range(2)]
    for thread in trunks:
        thread.start()
    for layer, asked in calls(compute):
        if layer:
            assert new.info().loading
            for ask in (lambda asked=asked: link.send(asked).result(SOON_S), lambda asked=asked: worker.forward(asked)):
                with pytest.raises(CallRefused, match=f"layer {layer} expert {EXPERT} is not held by this replica"):
                    ask()
            reader.let.release()
            eventually(lambda layer=layer: (layer, EXPERT) in worker.keys)
        assert torch.equal(link.send(asked).result(SOON_S).rows, wanted[layer])
        assert torch.equal(worker.forward(asked).rows, wanted[layer])
    assert new.arrival.wait(SOON_S)
    ended.set()
    for thread in trunks:
        thread.join()
    assert not failures
    assert worker.keys == KEYS
    assert not new.info().loading
    assert new.arrival.bytes_read == LAYERS * KEY_BYTES * 4
    assert [done for done, _ in reports] == [(layer + 1) * KEY_BYTES * 4 for layer in range(LAYERS)]
    assert reports[-1][0] == reports[-1][1]
    loads = worker.key_loads()
    assert loads.keys() == KEYS
    assert all(load.calls >= 2 for load in loads.values())
    link.close()


def test_the_directory_follows_a_replica_that_loads(
    replica: Callable[..., Replica], model: Path, compute: Compute
) -> None:
    reader = Reader(model, compute)
    new, old = replica(reader).start(), replica(Reader(model, compute).let_all()).start(done=True)
    directory = ReplicaTable(
        lambda: [new.info(), old.info()], lambda info: connect("socket", info, OPTIONS), KEYS, refresh_s=600
    )
    directory.refresh()
    directory.start()
    holders = {key: {held.replica_id for held in replicas} for key, replicas in directory.by_key.items()}
    assert holders == {key: {old.name, new.name} if key == (0, EXPERT) else {old.name} for key in KEYS}
    assert not directory.missing()
    link = next(each for each in directory.by_key[0, EXPERT] if each.replica_id == new.name).link
    for layer in range(1, LAYERS):
        version = directory.version
        reader.let.release()
        assert directory.wait_change(version, SOON_S)
        eventually(lambda layer=layer: len(directory.by_key[layer, EXPERT]) == 2)
    assert not link.broken
    directory.close()


def test_weights_come_from_a_peer_that_is_faster(
    replica: Callable[..., Replica], model: Path, compute: Compute
) -> None:
    old = replica(Reader(model, compute).let_all()).start(done=True)
    reports: list[tuple[int, int]] = []
    reader = Reader(model, compute, lambda *report: reports.append(report)).let_all()
    reader.before = lambda key: time.sleep(0.5)
    new = replica(reader).start([old.info()], done=True)
    assert new.arrival.failure is None
    sizes = new.arrival.worker.stats().weight_bytes // LAYERS
    from_disk = new.arrival.bytes_read // (4 * KEY_BYTES)
    assert new.arrival.bytes_from_peers == (LAYERS - from_disk) * sizes
    assert 1 <= from_disk <= 2, "the first layer, and one while the peer was looked for"
    assert reports[-1] == (LAYERS * KEY_BYTES * 4,) * 2
    for key in KEYS:
        theirs, ours = old.arrival.worker.buffers(key), new.arrival.worker.buffers(key)
        assert [bytes(buffer) for buffer in ours] == [bytes(buffer) for buffer in theirs]
    for (_, asked), wanted in zip(calls(compute), whole(model, compute), strict=True):
        assert torch.equal(new.arrival.worker.forward(asked).rows, wanted)
    third = replica(Reader(model, compute).let_all()).start([new.info()], done=True)
    assert third.arrival.worker.keys == KEYS, "what came from a peer is offered like what was read"


NATIVE = pytest.mark.parametrize("compute", ["native"], indirect=True)


@NATIVE
@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_weights_that_are_quantised_on_load_come_from_a_peer_as_they_are(
    replica: Callable[..., Replica], model: Path, compute: Compute, quantize: str
) -> None:
    old = replica(Reader(model, compute, quantize=quantize).let_all()).start(done=True)
    reader = Reader(model, compute, quantize=quantize).let_all()
    new = replica(reader)
    reader.before = lambda key: eventually(lambda: new.arrival._peer is not None)
    new.start([old.info()])
    assert new.arrival.wait(SOON_S)
    assert new.arrival.failure is None
    size, held = KEY_BYTES * {"int8": 1, "int4": 0.5, "nf4": 0.5}[quantize], new.arrival.worker.stats().weight_bytes
    assert size <= held / LAYERS < 1.5 * size, "in its own bits"
    assert new.arrival.bytes_from_peers % (held // LAYERS) == 0
    assert new.arrival.bytes_from_peers > 0
    for key in KEYS:
        theirs, ours = old.arrival.worker.buffers(key), new.arrival.worker.buffers(key)
        assert [bytes(buffer) for buffer in ours] == [bytes(buffer) for buffer in theirs]
    for (_, asked), wanted in zip(calls(compute), whole(model, compute, quantize), strict=True):
        assert torch.equal(new.arrival.worker.forward(asked).rows, wanted)


@NATIVE
def test_a_peer_that_holds_other_bits_refuses(
    replica: Callable[..., Replica], model: Path, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    """So replicas of one expert may differ in format."""
    old = replica(Reader(model, compute).let_all()).start(done=True)
    reader = Reader(model, compute, quantize="int4").let_all()
    new = replica(reader)
    reader.before = lambda key: eventually(lambda: new.arrival._peer is not None or "held as" in caplog.text)
    new.start([old.info()], done=True)
    assert "held as bfloat16" in caplog.text
    assert "not as int4 in groups of 32" in caplog.text
    assert new.arrival.bytes_from_peers == 0
    for (_, asked), wanted in zip(calls(compute), whole(model, compute, "int4"), strict=True):
        assert torch.equal(new.arrival.worker.forward(asked).rows, wanted)


def damage(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write_frame(pb.WeightsReply(status=pb.OK, sizes=sizes), (), 5, None)
    stream.write_frame(pb.WeightsChunk(size=sizes[0], crc32=1), [memoryview(bytes(sizes[0]))], 5, None)


def hang_up(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write_frame(pb.WeightsReply(status=pb.OK, sizes=sizes), (), 5, None)
    stream.write_frame(pb.WeightsChunk(size=sizes[0], crc32=1), [memoryview(bytes(sizes[0] // 2))], 5, None)
    stream.shutdown()


def too_much(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write_frame(pb.WeightsReply(status=pb.OK, sizes=sizes), (), 5, None)
    stream.write_frame(pb.WeightsChunk(size=sizes[0] + 1, crc32=1), (), 5, None)


def other_sizes(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write_frame(pb.WeightsReply(status=pb.OK, sizes=[size - 2 for size in sizes]), (), 5, None)


def garbage(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write([b"\x03\0\0\0\xff\xff\xff"], 5, None)


def refuse(stream: FrameStream, sizes: Sequence[int]) -> None:
    stream.write_frame(pb.WeightsReply(status=pb.REFUSED, error="too busy"), (), 5, None)


@pytest.mark.parametrize("fault", [damage, hang_up, too_much, other_sizes, garbage, refuse])
def test_a_peer_that_fails_is_asked_once_and_the_checkpoint_does(
    replica: Callable[..., Replica],
    model: Path,
    compute: Compute,
    fault: Callable[[FrameStream, Sequence[int]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked, reader = threading.Event(), Reader(model, compute)
    sizes = [len(buffer) for buffer in reader.blank((0, EXPERT)).buffers]

    def serve(sock) -> None:  # type: ignore[no-untyped-def]
        stream = FrameStream(sock)
        stream.wait_frame(None)
        stream.read_header(5)
        assert not asked.is_set(), "it was asked again"
        asked.set()
        fault(stream, sizes)
        stream.wait_frame(None)

    peer = Listener(serve, "127.0.0.1", 0, OPTIONS, WEIGHTS)
    new = replica(reader)
    # The next layer is read once the peer is known.
    reader.before = lambda key: eventually(lambda: new.arrival._peer is not None or asked.is_set())
    reader.let_all()
    new.start([replace(new.info(), replica_id="peer", keys=KEYS, loading=False, addresses={CARRIER: peer.address})])
    assert new.arrival.wait(SOON_S)
    assert asked.is_set()
    assert new.arrival.failure is None
    assert (new.arrival.bytes_from_peers, new.arrival.bytes_read) == (0, LAYERS * KEY_BYTES * 4)
    assert "the rest is read from the checkpoint" in caplog.text
    for (_, each), wanted in zip(calls(compute), whole(model, compute), strict=True):
        assert torch.equal(new.arrival.worker.forward(each).rows, wanted)
    peer.close()


def test_a_peer_with_another_checkpoint_refuses(
    replica: Callable[..., Replica], model: Path, other_model: Path, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    old = replica(Reader(other_model, compute).let_all()).start(done=True)
    reader = Reader(model, compute)
    new = replica(reader)
    reader.before = lambda key: eventually(lambda: new.arrival._peer is not None or "refused" in caplog.text)
    reader.let_all()
    new.start([old.info()], done=True)
    assert "is of another checkpoint here" in caplog.text
    assert new.arrival.bytes_from_peers == 0
    assert torch.equal(new.arrival.worker.forward(call(3, compute)).rows, whole(model, compute)[3])
    key, print_ = (0, EXPERT), Reader(other_model, compute).fingerprint((0, EXPERT))
    assert old.arrival.offer(key, reader.layout, print_)
    for wrong, says in (
        ((key, "w1, w2, w3, float64", print_), "held as"),
        (((0, 0), reader.layout, print_), "layer 0 expert 0 is not held"),
        ((key, reader.layout, b"other"), "of another checkpoint"),
    ):
        with pytest.raises(CallRefused, match=says):
            old.arrival.offer(*wrong)


def test_a_failure_is_remembered_and_what_is_loaded_is_served(
    replica: Callable[..., Replica], model: Path, compute: Compute
) -> None:
    def fail(key: ExpertKey) -> None:
        if key[0] == 2:
            raise CheckpointError("the disk is gone")

    reader = Reader(model, compute).let_all()
    reader.before = fail
    new = replica(reader).start(done=True)
    assert isinstance(new.arrival.failure, CheckpointError)
    assert not new.info().loading
    assert new.info().keys == {(0, EXPERT), (1, EXPERT)}
    assert torch.equal(new.arrival.worker.forward(call(1, compute)).rows, whole(model, compute)[1])


def test_closing_stops_the_loading(replica: Callable[..., Replica], model: Path, compute: Compute) -> None:
    reader = Reader(model, compute)
    new = replica(reader).start()
    threading.Timer(0.1, reader.let.release).start()  # the layer that is being read
    new.arrival.close()
    assert new.arrival.wait(SOON_S)
    assert len(new.arrival.worker.keys) == 2
    assert new.arrival.failure is None


def test_looking_for_peers_in_vain_is_no_failure(
    replica: Callable[..., Replica], model: Path, compute: Compute
) -> None:
    def away() -> list[ReplicaInfo]:
        raise NotReady("the controller is away")

    new = replica(Reader(model, compute).let_all())
    new.arrival.start(away, "new", "n", OPTIONS)
    assert new.arrival.wait(SOON_S)
    assert new.arrival.worker.keys == KEYS
    assert new.arrival.failure is None


def test_each_source_is_tried_and_the_faster_is_kept() -> None:
    source = FasterSource()
    assert source.next(has_peer=True) == "checkpoint"
    source.took("checkpoint", 100, 1.0)
    assert source.next(has_peer=False) == "checkpoint"
    assert source.next(has_peer=True) == "peer"
    source.took("peer", 100, 0.5)
    assert source.next(has_peer=True) == "peer"
    source.took("peer", 100, 4.0)
    assert source.next(has_peer=True) == "checkpoint", "the peer has become slow"
    source.took("checkpoint", 100, 3.0)
    assert source.next(has_peer=True) == "checkpoint"
    source.took("checkpoint", 100, 5.0)
    assert source.next(has_peer=True) == "peer"
    assert source.next(has_peer=False) == "checkpoint"


def test_who_is_a_peer() -> None:
    def info(name: str, node: str, **more: object) -> ReplicaInfo:
        fields = {"keys": KEYS, "addresses": {CARRIER: name, "grpc": "x"}, **more}
        return ReplicaInfo(name, node, 1, hidden_size=WIDTH, dtype="float32", **fields)  # type: ignore[arg-type]

    me, near, far = info("me", "here"), info("near", "here"), info("far", "there")
    useless = [
        info("loads", "here", loading=True),
        info("lacks", "here", keys=KEYS - {(3, EXPERT)}),
        info("deaf", "here", addresses={"grpc": "x"}),
    ]
    assert peer_of([me, *useless, far, near], "me", "here", KEYS) == "near"
    assert peer_of([me, *useless, far], "me", "here", KEYS) == "far"
    assert peer_of([me, *useless], "me", "here", KEYS) is None
    assert {peer_of([near, info("near2", "here"), far], "me", "here", KEYS) for _ in range(50)} == {"near", "near2"}
