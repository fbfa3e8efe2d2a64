"""What only mailboxes promise, between two processes: order, slots used again, and an end to every wait."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import echo_expert as echo
import pytest
import torch
from shared_device import SharedDevice

from moe_ray.core import ExpertCall, ReplicaInfo
from moe_ray.errors import LinkBroken, LinkTimeout, MailboxRefused, ReplicaBusy
from moe_ray.transport import connect
from moe_ray.transport.base import MAILBOX_ADDRESS, Link, LinkOptions
from moe_ray.transport.mailbox.expert_end import MailboxExpertServer
from moe_ray.transport.mailbox.memory import FlagPage
from moe_ray.transport.mailbox.ring import SLOT_ROWS, SLOTS, Ring, SlotLayout
from moe_ray.transport.mailbox.trunk_end import INLINE, TICKET, CardMailboxes, MailboxLink
from moe_ray.transport.mailbox.watchdog import Wait, Watchdog
from moe_ray.transport.socket import SocketExpertServer, SocketLink

OPTIONS = LinkOptions(token=echo.TOKEN, connect_timeout_s=10.0)
WAIT_S = 20.0
Start = Callable[..., tuple[ReplicaInfo, int]]


class Trunk:
    """One that has a device of its own, as each process has."""

    def __init__(self, card: str = "card-0") -> None:
        self.device = SharedDevice(card)
        self.mailboxes = CardMailboxes(self.device)
        self.options = replace(OPTIONS, mailboxes=self.mailboxes)

    def link(self, info: ReplicaInfo) -> MailboxLink:
        link = connect("socket", info, self.options)
        assert isinstance(link, MailboxLink)
        return link


@pytest.fixture
def trunk() -> Trunk:
    return Trunk()


@pytest.fixture(scope="module")
def expert(expert_process: Start) -> ReplicaInfo:
    """A process that is patient."""
    info, _ = expert_process("card", echo.TOKEN)
    return info


@pytest.fixture(scope="module")
def hasty(expert_process: Start) -> Iterator[ReplicaInfo]:
    """A process that waits 0.1 s for the rows of a call."""
    os.environ[echo.WAIT] = "0.1"
    try:
        info, _ = expert_process("card", echo.TOKEN)
    finally:
        del os.environ[echo.WAIT]
    return info


def make_call(seed: int = 0, expert: int = echo.ECHO, layer: int = 3, rows: int = 5) -> ExpertCall:
    generator = torch.Generator().manual_seed(seed)
    return ExpertCall(layer, expert, torch.randn(rows, 8, generator=generator), torch.rand(rows, generator=generator))


def assert_answers(link: Link, seed: int = 0) -> None:
    call = make_call(seed)
    assert torch.equal(link.send(call).result(WAIT_S).rows, echo.weighted(call))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# ---- order


def test_rows_go_through_the_card(trunk: Trunk, expert: ReplicaInfo) -> None:
    link = trunk.link(expert)
    assert_answers(link)
    assert trunk.device.copies == 3, "rows, weights and the reply"
    link.close()


def test_a_call_waits_for_its_rows(trunk: Trunk, expert: ReplicaInfo) -> None:
    """Its header is there, and the slot has an earlier call's rows."""
    link = trunk.link(expert)
    for seed in range(SLOTS):
        assert_answers(link, seed)
    trunk.device.hold()
    call = make_call(99)
    reply = link.send(call)
    with pytest.raises(LinkTimeout):
        reply.result(0.3)
    trunk.device.go_on()
    assert torch.equal(reply.result(WAIT_S).rows, echo.weighted(call))
    link.close()


def test_slots_are_used_again(trunk: Trunk, expert: ReplicaInfo) -> None:
    link = trunk.link(expert)
    for turn in range(30):
        calls = [make_call(10 * turn + i, rows=1 + (turn + i) % 7) for i in range(1 + turn % SLOTS)]
        replies = [link.send(call) for call in calls]
        for call, reply in reversed([*zip(calls, replies, strict=True)]):
            assert torch.equal(reply.result(WAIT_S).rows, echo.weighted(call))
    link.close()


def test_more_calls_than_slots_take_the_socket(trunk: Trunk, expert: ReplicaInfo) -> None:
    link = trunk.link(expert)
    calls = [make_call(i, echo.SLOW, layer=5) for i in range(3 * SLOTS)]
    replies = [link.send(call) for call in calls]
    assert trunk.device.copies == 2 * SLOTS
    for call, reply in zip(calls, replies, strict=True):
        assert torch.equal(reply.result(WAIT_S).rows, echo.weighted(call))
    assert_answers(link)
    link.close()


def test_what_fits_no_slot_takes_the_socket(trunk: Trunk, expert: ReplicaInfo) -> None:
    link = trunk.link(expert)
    fits, does_not = make_call(1, rows=SLOT_ROWS), make_call(2, rows=SLOT_ROWS + 100)
    assert torch.equal(link.send(fits).result(WAIT_S).rows, echo.weighted(fits))
    before = trunk.device.copies
    assert torch.equal(link.send(does_not).result(WAIT_S).rows, echo.weighted(does_not))
    assert trunk.device.copies == before
    link.close()


# ---- late ends


def test_rows_that_come_too_late_are_refused_and_the_slot_goes_on(trunk: Trunk, hasty: ReplicaInfo) -> None:
    """The replica has released the waits itself; what is written then is of generations that nobody waits for."""
    link = trunk.link(hasty)
    trunk.device.hold()
    late = [link.send(make_call(i)) for i in range(SLOTS)]
    for reply in late:
        with pytest.raises(ReplicaBusy, match="not there in time"):
            reply.result(WAIT_S)
    assert not link.broken
    again = [make_call(100 + i) for i in range(SLOTS)]
    replies = [link.send(call) for call in again]
    threading.Timer(0.02, trunk.device.go_on).start()
    for call, reply in zip(again, replies, strict=True):
        assert torch.equal(reply.result(WAIT_S).rows, echo.weighted(call))
    link.close()


def test_a_slot_that_may_still_be_read_is_no_other_calls(trunk: Trunk, expert: ReplicaInfo) -> None:
    """Cancelled, or given up, calls keep theirs until the replica has answered."""
    link = trunk.link(expert)
    slow = link.send(make_call(1, echo.SLOW, layer=300))
    waiting = [link.send(make_call(i)) for i in range(2, 1 + SLOTS)]
    before = trunk.device.copies
    slow.cancel()
    for reply in waiting:
        reply.cancel()
    assert_answers(link, 50)
    assert trunk.device.copies == before + SLOTS, "it took the socket; four replies were read"
    assert_answers(link, 51)
    assert trunk.device.copies == before + SLOTS + 3
    link.close()


def test_generations_are_cyclic() -> None:
    page, descriptor = FlagPage.create()
    os.close(descriptor)
    assert page.reached(0, 0)
    assert not page.reached(0, 1)
    page.store(0, 5)
    assert page.reached(0, 5)
    assert not page.reached(0, 6)
    page.store(0, 4)  # a late writer
    assert not page.reached(0, 5)
    page.store(1, 0xFFFF_FFFF)
    assert page.reached(1, 0xFFFF_FFFF)
    assert not page.reached(1, 0)
    page.store(1, 0)
    assert page.reached(1, 0xFFFF_FFFF)
    assert not page.is_closed


def test_a_ring_gives_each_call_a_generation_of_its_own() -> None:
    ring = Ring(2)
    first, second = ring.take(1), ring.take(2)
    assert first is not None
    assert second is not None
    assert first.slot != second.slot
    assert ring.take(3) is None
    assert ring.give(1) == first
    assert ring.give(1) is None
    third = ring.take(3)
    assert third is not None
    assert (third.slot, third.generation) == (first.slot, first.generation + 1)


# ---- death


def test_a_replica_that_is_killed_in_mid_call(trunk: Trunk, expert_process: Start) -> None:
    info, pid = expert_process("card", echo.TOKEN)
    link = trunk.link(info)
    assert_answers(link)
    replies = [link.send(make_call(i, echo.SLOW, layer=3000)) for i in range(SLOTS + 2)]
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    for reply in replies:
        with pytest.raises(LinkBroken):
            reply.result(WAIT_S)
    assert time.monotonic() - started < 2
    assert until(lambda: trunk.mailboxes.sweep() == 0), "its memory is free"
    assert (trunk.device.regions, trunk.device.pages) == (0, [])


DYING = """
import sys
import echo_expert as echo, torch
from shared_device import SharedDevice
from moe_ray.core import ExpertCall
from moe_ray.transport import connect
from moe_ray.transport.base import LinkOptions
from moe_ray.transport.mailbox.trunk_end import CardMailboxes

device = SharedDevice()
options = LinkOptions(token=echo.TOKEN, mailboxes=CardMailboxes(device))
link = connect("socket", echo.info({"socket": sys.argv[1], "ipc": sys.argv[2]}), options)
assert link.on_card
device.hold()
link.send(ExpertCall(3, echo.ECHO, torch.randn(5, 8), torch.rand(5)))
print("sent", flush=True)
sys.stdin.read()
"""


class Here:
    """A replica in this process, whose device can be looked at."""

    def __init__(self, wait_s: float = 60.0) -> None:
        self.device = SharedDevice()
        self.socket = SocketExpertServer(echo.behave, options=OPTIONS)
        self.mailboxes = MailboxExpertServer(echo.behave, self.device, OPTIONS, wait_s)
        self.info = echo.info({"socket": self.socket.address, MAILBOX_ADDRESS: self.mailboxes.address})

    def close(self) -> None:
        self.mailboxes.close()
        self.socket.close()


@pytest.fixture
def here() -> Iterator[Here]:
    made = Here()
    yield made
    made.close()


def test_a_trunk_that_is_killed_in_mid_call_wedges_nobody(trunk: Trunk, here: Here) -> None:
    """It has sent a header, and its rows never come: the replica would wait for a minute."""
    arguments = [sys.executable, "-c", DYING, here.info.addresses["socket"], here.info.addresses[MAILBOX_ADDRESS]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    dying = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    assert dying.stdout is not None
    assert dying.stdout.readline().strip() == "sent"
    time.sleep(0.2)
    link = trunk.link(here.info)
    behind = link.send(make_call(7))
    with pytest.raises(LinkTimeout):
        behind.result(0.2)
    dying.kill()
    started = time.monotonic()
    assert torch.equal(behind.result(WAIT_S).rows, echo.weighted(make_call(7)))
    assert time.monotonic() - started < 2
    dying.communicate()
    link.close()
    assert until(lambda: here.device.regions == 0 and not here.device.pages)
    assert until(lambda: trunk.mailboxes.sweep() == 0)
    assert trunk.device.regions == 0


def test_a_replica_that_closes_ends_its_waits(trunk: Trunk) -> None:
    here = Here()
    link = trunk.link(here.info)
    assert_answers(link)
    trunk.device.hold()
    reply = link.send(make_call(1))
    time.sleep(0.05)
    here.close()
    with pytest.raises(LinkBroken):
        reply.result(WAIT_S)
    assert until(lambda: here.device.regions == 0), "its stream went on"
    trunk.device.go_on()


def test_a_watchdog_that_is_closed_lets_nothing_wait() -> None:
    dog = Watchdog()
    dog.close()
    page, descriptor = FlagPage.create()
    os.close(descriptor)
    wait = Wait(page, 0, 1, time.monotonic() + 60, lambda: False)
    dog.guard(wait)
    assert wait.released
    assert page.reached(0, 1)


def test_links_take_turns_and_their_memory_is_freed(trunk: Trunk, expert: ReplicaInfo) -> None:
    def use(seed: int) -> None:
        link = trunk.link(expert)
        for i in range(10):
            assert_answers(link, 100 * seed + i)
        link.close()
        link.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(8)))
    assert until(lambda: trunk.mailboxes.sweep() == 0)
    assert (trunk.device.regions, trunk.device.pages) == (0, [])


# ---- refusals


def test_another_card_takes_the_socket_and_says_so_once(expert: ReplicaInfo, caplog: pytest.LogCaptureFixture) -> None:
    other = Trunk("card-1")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            link = connect("socket", expert, other.options)
            assert isinstance(link, SocketLink)
            assert not link.on_card
            assert_answers(link)
            link.close()
    (said,) = caplog.messages
    assert "its card is card-0, the trunk's is card-1" in said
    assert (other.device.regions, other.device.copies) == (0, 0)


def test_a_handle_that_cannot_be_opened_takes_the_socket(trunk: Trunk, expert: ReplicaInfo) -> None:
    allocate = trunk.device.allocate
    trunk.device.allocate = lambda nbytes: replace(allocate(nbytes), handle=b"/etc/passwd")  # type: ignore[method-assign]
    link = connect("socket", expert, trunk.options)
    assert not link.on_card
    assert_answers(link)
    link.close()


def test_no_memory_for_a_mailbox_takes_the_socket(trunk: Trunk, expert: ReplicaInfo) -> None:
    def full(nbytes: int) -> None:
        raise MailboxRefused("out of memory")

    trunk.device.allocate = full  # type: ignore[method-assign,assignment]
    assert not connect("socket", expert, trunk.options).on_card


def test_a_replica_on_another_machine_takes_the_socket(trunk: Trunk, expert: ReplicaInfo) -> None:
    addresses = {**expert.addresses, MAILBOX_ADDRESS: "127.0.0.1:1,moe-ray-of-another-machine"}
    link = connect("socket", replace(expert, addresses=addresses), trunk.options)
    assert not link.on_card
    assert_answers(link)
    link.close()


@pytest.mark.parametrize(
    "ticket", [TICKET.pack(SLOTS, 1, 0.0), TICKET.pack(2**31, 1, 0.0), TICKET.pack(INLINE - 1, 1, 0.0)]
)
def test_a_slot_that_is_none_ends_that_connection_alone(trunk: Trunk, expert: ReplicaInfo, ticket: bytes) -> None:
    healthy, rude = trunk.link(expert), trunk.link(expert)
    rude._body = lambda call: [ticket]  # type: ignore[method-assign]
    with pytest.raises(LinkBroken):
        rude.send(make_call()).result(WAIT_S)
    assert_answers(healthy)
    healthy.close()


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x02\x00\x00\x00{}", b"\x04\x00\x00\x00nope", b"\x01"])
def test_an_offer_that_is_none_ends_that_connection_alone(trunk: Trunk, expert: ReplicaInfo, garbage: bytes) -> None:
    from moe_ray.transport.handshake import connect as shake_hands
    from moe_ray.transport.mailbox.offer import MAILBOXES

    name = expert.addresses[MAILBOX_ADDRESS].partition(",")[2]
    rude = shake_hands(f",{name}", OPTIONS, MAILBOXES)
    rude.sendall(garbage)
    rude.shutdown(socket.SHUT_WR)
    rude.settimeout(WAIT_S)
    assert rude.recv(1) == b""
    rude.close()
    link = trunk.link(expert)
    assert_answers(link)
    link.close()


def test_a_wrong_token_gets_no_mailbox(trunk: Trunk, expert: ReplicaInfo) -> None:
    with pytest.raises(LinkBroken, match="refused the cluster token"):
        connect("socket", expert, replace(trunk.options, token="wrong"))
    assert until(lambda: trunk.mailboxes.sweep() == 0)


def test_a_layout_has_room_for_what_it_says() -> None:
    layout = SlotLayout.of(8, 2)
    memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
    assert layout.fits_call(SLOT_ROWS * 16, SLOT_ROWS)
    assert not layout.fits_call(2 * SLOT_ROWS * 16, 2 * SLOT_ROWS)
    pieces = [layout.reply_slot(memory, slot, (SLOT_ROWS, 8), torch.bfloat16) for slot in range(SLOTS)]
    for slot in range(SLOTS):
        pieces += layout.call_slot(memory, slot, (SLOT_ROWS, 8), torch.bfloat16)
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    assert all(bool((piece == value).all()) for value, piece in enumerate(pieces)), "none overlaps another"
