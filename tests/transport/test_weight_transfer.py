"""Weights from one replica's memory into another's: whole, checked, and for those only who know the token."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moe_ray.core import WeightLayout
from moe_ray.errors import CallRefused, LinkBroken, ProtocolError, ReplicaBusy
from moe_ray.transport.base import LinkOptions, TlsFiles
from moe_ray.transport.handshake import connect
from moe_ray.transport.socket import SocketExpertServer
from moe_ray.transport.weight_transfer import CHUNK_BYTES, MAX_TRANSFERS, WeightsLink, WeightsServer

OPTIONS = LinkOptions(token="t", connect_timeout_s=3.0)
SIZES = (2 * CHUNK_BYTES + 5, 0, 1000)
KEY, PRINT = (3, 1), b"print"
LAYOUT = WeightLayout("int4", "packed", "bfloat16", (64, 96), (("group_size", "32"), ("symmetric", "true")))
OTHER = replace(LAYOUT, options=(("group_size", "64"), ("symmetric", "true")))


def content(seed: int) -> list[memoryview]:
    return [memoryview(bytes((7 * i + seed) % 251 for i in range(251)) * (size // 251 + 1))[:size] for size in SIZES]


def blank() -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in SIZES]


class Offer:
    """Offers some buffers for one key; waits to be let, where a test wants that."""

    def __init__(self) -> None:
        self.buffers, self.let, self.entered = content(1), threading.Event(), threading.Semaphore(0)
        self.let.set()

    def __call__(self, key: tuple[int, int], layout: WeightLayout, fingerprint: bytes) -> Sequence[memoryview]:
        self.entered.release()
        assert self.let.wait(20)
        if (key, layout, fingerprint) != (KEY, LAYOUT, PRINT):
            raise CallRefused(f"no {key} as {layout}")
        return self.buffers


@pytest.fixture
def offer() -> Offer:
    return Offer()


@pytest.fixture
def server(offer: Offer) -> Iterator[WeightsServer]:
    server = WeightsServer(offer, options=OPTIONS)
    yield server
    offer.let.set()
    server.close()
    server.close()


def ways(server: WeightsServer) -> list[str]:
    return [server.address, server.address.split(",")[0] + ","]


def test_what_arrives_is_what_was_there(server: WeightsServer, offer: Offer) -> None:
    for address in ways(server):  # Unix socket, TCP
        link = WeightsLink(address, OPTIONS)
        for seed in range(2):
            offer.buffers, into = content(seed), blank()
            link.read(KEY, LAYOUT, PRINT, into)
            assert into == offer.buffers
        link.close()
        with pytest.raises(LinkBroken):
            link.read(KEY, LAYOUT, PRINT, blank())


def test_what_is_refused_leaves_the_link_alone(server: WeightsServer, offer: Offer) -> None:
    link = WeightsLink(server.address, OPTIONS)
    for wrong in (((0, 0), LAYOUT, PRINT), (KEY, OTHER, PRINT), (KEY, LAYOUT, b"")):
        with pytest.raises(CallRefused, match="refused: no"):
            link.read(*wrong, blank())
    into = blank()
    link.read(KEY, LAYOUT, PRINT, into)
    assert into == offer.buffers


def test_buffers_of_other_sizes_are_not_taken(server: WeightsServer) -> None:
    link = WeightsLink(server.address, OPTIONS)
    with pytest.raises(LinkBroken, match="expected"):
        link.read(KEY, LAYOUT, PRINT, blank()[:2])


@pytest.mark.parametrize("shown", ["wrong", "", None])
def test_a_wrong_token_is_refused(server: WeightsServer, offer: Offer, shown: str | None) -> None:
    for address in ways(server):
        with pytest.raises(LinkBroken, match="refused the cluster token"):
            WeightsLink(address, LinkOptions(token=shown))
    assert not offer.entered.acquire(blocking=False)


def test_the_ports_of_calls_and_of_weights_are_not_taken_for_each_other(server: WeightsServer) -> None:
    calls = SocketExpertServer(lambda call: pytest.fail("called"), options=OPTIONS)
    with pytest.raises(LinkBroken, match="not a moe_ray expert"):
        WeightsLink(calls.address, OPTIONS)
    with pytest.raises(ProtocolError, match="not a moe_ray expert"):
        connect(server.address, OPTIONS)
    calls.close()


def test_few_transfers_at_a_time(server: WeightsServer, offer: Offer) -> None:
    offer.let.clear()
    links = [WeightsLink(server.address, OPTIONS) for _ in range(MAX_TRANSFERS + 1)]
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        targets = [blank() for _ in range(MAX_TRANSFERS)]
        running = [
            pool.submit(link.read, KEY, LAYOUT, PRINT, into) for link, into in zip(links[1:], targets, strict=True)
        ]
        for _ in running:
            assert offer.entered.acquire(timeout=20)
        with pytest.raises(ReplicaBusy, match="transfers are in progress"):
            links[0].read(KEY, LAYOUT, PRINT, blank())
        offer.let.set()
        for each in running:
            each.result(20)
    assert targets == [offer.buffers] * MAX_TRANSFERS
    links[0].read(KEY, LAYOUT, PRINT, blank())


def test_a_peer_that_goes_away_wakes_who_waits(server: WeightsServer, offer: Offer) -> None:
    offer.let.clear()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(WeightsLink(server.address, OPTIONS).read, KEY, LAYOUT, PRINT, blank())
        assert offer.entered.acquire(timeout=20)
        server.close()
        offer.let.set()
        with pytest.raises(LinkBroken):
            reading.result(20)
    with pytest.raises(LinkBroken):
        WeightsLink(server.address, OPTIONS)


def test_a_link_closed_elsewhere_wakes_who_waits(server: WeightsServer, offer: Offer) -> None:
    offer.let.clear()
    link = WeightsLink(server.address, OPTIONS)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(link.read, KEY, LAYOUT, PRINT, blank())
        assert offer.entered.acquire(timeout=20)
        link.close()
        with pytest.raises(LinkBroken):
            reading.result(20)
    offer.let.set()


def test_over_tls(tmp_path: Path, offer: Offer) -> None:
    for name in ("ours", "strangers"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=experts"),
                *("-addext", "subjectAltName=DNS:experts"),
            ],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def options(name: str) -> LinkOptions:
        certificate, key = str(tmp_path / f"{name}.pem"), str(tmp_path / f"{name}.key")
        return LinkOptions(token="t", tls=TlsFiles(certificate, key, certificate, server_name="experts"))

    server = WeightsServer(offer, options=options("ours"))
    tcp, into = ways(server)[1], blank()
    WeightsLink(tcp, options("ours")).read(KEY, LAYOUT, PRINT, into)
    assert into == offer.buffers
    for wrong in (options("strangers"), LinkOptions(token="t", connect_timeout_s=1.0)):
        with pytest.raises(LinkBroken):
            WeightsLink(tcp, wrong).read(KEY, LAYOUT, PRINT, blank())
    server.close()


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_packed_weights_are_those_that_packing_gives(quantize: str | None) -> None:
    """With all that they need: a block says of itself how its codes are to be read."""
    import torch
    from backends import open_backend, random

    from moe_ray.model.compute.native.held_form import form_of, hold
    from moe_ray.model.matrix import FloatMatrix
    from moe_ray.native.kernels import Packed

    kernels = open_backend("native bfloat16").kernels
    assert kernels is not None
    gate, up = (FloatMatrix(random(72, 64, seed=seed)) for seed in range(2))  # the last panel is not full
    form = form_of([gate, up], "bfloat16", quantize)

    def memory(packed: Packed) -> list[memoryview]:
        return [memoryview(packed.memory)]

    held = hold(kernels, form, [gate], [up])
    server = WeightsServer(lambda key, layout, fingerprint: memory(held), options=OPTIONS)
    arrived = kernels.blank(form.block(gate.shape, 2))
    WeightsLink(server.address, OPTIONS).read(KEY, LAYOUT, PRINT, memory(arrived))
    assert bytes(arrived.memory) == bytes(hold(kernels, form, [gate], [up]).memory)
    rows = torch.arange(72)
    assert torch.equal(kernels.unpack_rows(arrived, rows), kernels.unpack_rows(held, rows))
    server.close()
