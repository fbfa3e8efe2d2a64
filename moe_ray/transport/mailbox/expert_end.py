"""The expert's end of a mailbox: computes on rows in a trunk's memory and writes its reply there."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from moe_ray.core import ExpertCall, ExpertReply
from moe_ray.errors import CallCancelled, MailboxRefused, ProtocolError, ReplicaBusy
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.adapter_runs import runs_of
from moe_ray.transport.base import ExpertHandler, LinkOptions
from moe_ray.transport.checks import sum_of
from moe_ray.transport.frames import STALL_S, FrameStream
from moe_ray.transport.handshake import is_over
from moe_ray.transport.listener import Listener
from moe_ray.transport.mailbox.memory import DeviceMemory, FlagPage, Region
from moe_ray.transport.mailbox.offer import MAILBOXES, answer_offer, read_offer
from moe_ray.transport.mailbox.ring import SlotLayout
from moe_ray.transport.mailbox.trunk_end import INLINE, TICKET
from moe_ray.transport.mailbox.watchdog import Wait, Watchdog
from moe_ray.transport.messages import parse
from moe_ray.transport.serving import ANSWERED_ERRORS, answer
from moe_ray.transport.socket import taken_back

if TYPE_CHECKING:
    import torch

WAIT_S: Final = 1.0
"""For a call's rows, from its header on: others' calls wait behind it. Then it is answered as busy, and sent again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """The mailbox of one connection."""

    sock: socket.socket
    stream: FrameStream
    layout: SlotLayout
    region: Region
    page: FlagPage


class MailboxExpertServer:
    """`base.ExpertServer`: serves `handler`, whose rows are on the card, on a Unix socket until `close`."""

    def __init__(
        self, handler: ExpertHandler, memory: DeviceMemory, options: LinkOptions | None = None, wait_s: float = WAIT_S
    ) -> None:
        """Listen. Raises `ConfigError`."""
        self._handler, self._memory, self._wait_s = handler, memory, wait_s
        self._watchdog = Watchdog()
        self._listener = Listener(self._serve, "127.0.0.1", 0, options or LinkOptions(), MAILBOXES, "mailbox")
        self.address = self._listener.address

    def close(self) -> None:
        """Stop listening and end every connection; no stream waits for a trunk any more. Idempotent."""
        self._listener.close()
        self._watchdog.close()

    def _serve(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            raise ProtocolError("a mailbox is offered on a Unix socket")
        offer, page = read_offer(sock)
        try:
            region = self._open(offer.card, offer.handle, offer.layout, page)
        except MailboxRefused as error:
            answer_offer(sock, str(error))
            return
        try:
            answer_offer(sock, "")
            opened = _Opened(sock, FrameStream(sock), offer.layout, region, page)
            while True:
                opened.stream.wait_frame(None)
                self._answer(opened, parse(pb.ExpertCallHeader, opened.stream.read_header(STALL_S)))
        except MailboxRefused as error:  # of the driver, in mid-call: the trunk connects anew
            raise ConnectionError(str(error)) from error
        finally:
            self._memory.wait(self._memory.mark())
            self._memory.forget(page)
            region.close()
            page.say_closed()

    def _open(self, card: str, handle: bytes, layout: SlotLayout, page: FlagPage) -> Region:
        if card != self._memory.card:
            raise MailboxRefused(f"its card is {self._memory.card}, the trunk's is {card}")
        region = self._memory.open(handle, layout.nbytes)
        try:
            self._memory.register(page)
        except MailboxRefused:
            region.close()
            raise
        return region

    def _answer(self, opened: _Opened, header: pb.ExpertCallHeader) -> None:
        if header.cancel:
            return  # too late: that call has been answered
        ticket = bytearray(TICKET.size)
        opened.stream.read_into(memoryview(ticket), STALL_S)
        slot, generation, _ = TICKET.unpack(ticket)
        body: list[torch.Tensor | bytes] = []
        try:
            if slot == INLINE:
                rows, weights = wire.empty_rows(header), wire.empty_weights(header.num_rows)
                opened.stream.read_into(wire.buffer(rows), STALL_S)
                opened.stream.read_into(wire.buffer(weights), STALL_S)
                reply = answer(self._handler, self._call(opened, header, rows, weights))
                body = [TICKET.pack(INLINE, 0, 0.0), wire.sendable(reply.rows)]
            else:
                reply, body = self._by_card(opened, header, slot, generation)
            head = wire.reply_header(reply)
        except CallCancelled:
            head = pb.ExpertReplyHeader(call_id=header.call_id, status=pb.CANCELLED)
        except ANSWERED_ERRORS as error:
            head = wire.pack_error(header.call_id, error).header
        parts = [memoryview(each) if isinstance(each, bytes) else wire.buffer(each) for each in body]
        opened.stream.write_frame(head, parts, None, None)

    def _by_card(
        self, opened: _Opened, header: pb.ExpertCallHeader, slot: int, generation: int
    ) -> tuple[ExpertReply, list[torch.Tensor | bytes]]:
        """Compute on the rows in a slot. Whatever this raises, the device uses the slot no more."""
        memory, layout = self._memory, opened.layout
        shape, dtype = wire.form_of(header)
        if slot >= layout.slots or not layout.fits_call(shape[0] * shape[1] * dtype.itemsize, shape[0]):
            raise _Hostile(f"a call of {list(shape)} in slot {slot} of {layout.slots}")
        rows, weights = layout.call_slot(opened.region.memory, slot, shape, dtype)
        deadline = time.monotonic() + self._wait_s
        wait = Wait(opened.page, slot, generation, deadline, partial(is_over, opened.sock))
        self._watchdog.guard(wait)
        memory.wait_flag(opened.page, slot, generation)
        memory.join()
        try:
            _raise_if_released(wait)  # where it is known by now
            reply = answer(self._handler, self._call(opened, header, rows, weights))
            total = sum_of(reply.rows)
            fits = reply.rows.nbytes <= layout.slot_bytes
            if fits:
                shape = (reply.rows.shape[0], reply.rows.shape[1])
                memory.copy(layout.reply_slot(opened.region.memory, slot, shape, reply.rows.dtype), reply.rows)
        finally:
            memory.wait(memory.mark())
            _raise_if_released(wait)
        if not fits:
            return reply, [TICKET.pack(INLINE, 0, 0.0), wire.sendable(reply.rows)]
        return reply, [TICKET.pack(slot, generation, float(total))]

    def _call(
        self, opened: _Opened, header: pb.ExpertCallHeader, rows: torch.Tensor, weights: torch.Tensor
    ) -> ExpertCall:
        withdrawn = partial(taken_back, opened.stream, header.call_id)
        return ExpertCall(header.layer, header.expert, rows, weights, header.call_id, withdrawn, runs_of(header))


class _Hostile(OSError):
    """What ends a connection: no trunk asks for that."""


def _raise_if_released(wait: Wait) -> None:
    if wait.released:
        raise ReplicaBusy(f"the rows of a call: {wait.released}")
