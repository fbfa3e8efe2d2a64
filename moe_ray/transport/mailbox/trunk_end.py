"""The trunk's end of a mailbox: a socket carrier whose rows go through memory of the card that both ends compute on.

The socket carries headers, and a ticket (slot, generation) behind each instead of rows. The memory is the trunk's: an
expert that dies takes nothing along that the trunk still reads, and the trunk's stream never waits for another process.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import LinkBroken, MailboxRefused, ProtocolError
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.base import MAILBOX_ADDRESS, LinkOptions
from moe_ray.transport.checks import check_reply
from moe_ray.transport.frames import STALL_S
from moe_ray.transport.handshake import connect
from moe_ray.transport.mailbox.memory import DeviceMemory, FlagPage, Region
from moe_ray.transport.mailbox.offer import MAILBOXES, MailboxOffer, make_offer
from moe_ray.transport.mailbox.ring import Ring, SlotLayout, SlotPlace
from moe_ray.transport.pending import address_of
from moe_ray.transport.socket import SocketLink

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TICKET: Final = struct.Struct("<IId")
"""Slot, its generation and, of a reply, the sum of its rows. Little-endian, as all on the wire."""
INLINE: Final = 0xFFFF_FFFF
"""The slot of what follows on the socket itself: all slots are taken, or it fits none."""
_CREDENTIALS: Final = struct.Struct("3i")


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """The memory of one link."""

    layout: SlotLayout
    region: Region
    page: FlagPage


class MailboxLink(SocketLink):
    """`base.Link`: liveness, errors and cancelling are those of the socket."""

    on_card = True
    carrier = MAILBOX_ADDRESS

    def __init__(self, info: ReplicaInfo, options: LinkOptions, memory: DeviceMemory, boxes: CardMailboxes) -> None:
        """Connect, prove the token and offer the memory. Raises `LinkBroken`, `MailboxRefused`."""
        self._memory, self._boxes, self._offered = memory, boxes, False
        self._box = boxes.make(SlotLayout.of(info.hidden_size, 4 if info.dtype == "float32" else 2))
        self._ring, self._places = Ring(self._box.layout.slots), dict[int, SlotPlace]()
        self._peer_pid = 0
        try:
            super().__init__(info, options)
        except BaseException:
            self._retire()
            raise

    def checked(self, call: ExpertCall, reply: ExpertReply) -> ExpertReply:
        """Nothing is left to check."""
        return reply

    def _connect(self, options: LinkOptions) -> socket.socket:
        _, _, name = address_of(self.info, MAILBOX_ADDRESS).partition(",")
        try:
            sock = connect(f",{name}", options, MAILBOXES)
        except (ProtocolError, OSError, EOFError) as error:
            raise MailboxRefused(f"no Unix socket leads to it ({error})") from None
        try:
            told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self._peer_pid = _CREDENTIALS.unpack(told)[0]
            self._offered = True
            offer = MailboxOffer(self._memory.card, self._box.region.handle, self._box.layout)
            make_offer(sock, offer, self._boxes.descriptor_of(self._box))
        except BaseException as error:
            sock.close()
            if isinstance(error, MailboxRefused):
                self._offered = False
            raise
        return sock

    def _body(self, call: ExpertCall) -> list[torch.Tensor | bytes]:
        layout, rows, weights = self._box.layout, call.rows.detach(), call.weights.detach()
        place = self._ring.take(call.call_id) if layout.fits_call(rows.nbytes, len(rows)) else None
        if place is None:
            return [TICKET.pack(INLINE, 0, 0.0), *super()._body(call)]
        self._places[call.call_id] = place
        shape = (rows.shape[0], rows.shape[1])
        to_rows, to_weights = layout.call_slot(self._box.region.memory, place.slot, shape, rows.dtype)
        self._memory.copy(to_rows, rows)
        self._memory.copy(to_weights, weights)
        try:
            self._memory.write_flag(self._box.page, place.slot, place.generation)
        except MailboxRefused as error:  # of the driver, in mid-call
            raise ConnectionError(str(error)) from error
        return [TICKET.pack(place.slot, place.generation, 0.0)]

    def _read_rows(self, call: ExpertCall, header: pb.ExpertReplyHeader) -> torch.Tensor:
        import torch

        ticket = bytearray(TICKET.size)
        self._stream.read_into(memoryview(ticket), STALL_S)
        slot, generation, total = TICKET.unpack(ticket)
        if slot == INLINE:
            rows = super()._read_rows(call, header)
            check_reply(call, ExpertReply(header.call_id, rows))
            return rows.to(call.rows.device)
        place = self._places.get(header.call_id)
        if place is None or (place.slot, place.generation) != (slot, generation):
            raise ProtocolError(f"the reply to call {header.call_id} is in slot {slot} of generation {generation}")
        shape, dtype = wire.form_of(header)
        layout = self._box.layout
        if shape[0] * shape[1] * dtype.itemsize > layout.slot_bytes:
            raise ProtocolError(f"the reply to call {header.call_id} is larger than its slot")
        held = layout.reply_slot(self._box.region.memory, slot, shape, dtype)
        check_reply(call, ExpertReply(header.call_id, held), total)
        # Read before the slot is written again: that is ordered behind this thread's next flag for it.
        rows = torch.empty(shape, dtype=dtype, device=held.device)
        self._memory.copy(rows, held)
        self._memory.join()
        return rows.to(call.rows.device)

    def _settled(self, call_id: int) -> None:
        self._ring.give(call_id)
        self._places.pop(call_id, None)

    def _broke(self, reason: str) -> LinkBroken:
        error = super()._broke(reason)
        self._retire()
        return error

    def _retire(self) -> None:
        self._boxes.retire(self._box, self._peer_pid if self._offered else None)


class CardMailboxes:
    """`base.Mailboxes`: those of one trunk. Thread-safe.

    Memory that a replica may still have open is kept until the replica has let it go, or its process is gone.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._descriptors: dict[Box, int] = {}
        self._retired: dict[Box, tuple[Any, int | None]] = {}
        """With the end of what this process has begun on it, and the replica's process; None: nobody opened it."""

    def link_to(self, info: ReplicaInfo, options: LinkOptions) -> MailboxLink | None:
        """A link whose rows go through the card's memory; None: it was refused, and that has been said, once."""
        self.sweep()
        try:
            return MailboxLink(info, options, self._memory, self)
        except (MailboxRefused, LinkBroken) as error:
            reason = str(error)
            if reason not in self._said:
                self._said.add(reason)
                logger.info("%s: rows go over its socket, not through the card: %s", info.replica_id, reason)
            return None

    def make(self, layout: SlotLayout) -> Box:
        """The memory of a new link. Raises `MailboxRefused`."""
        region = self._memory.allocate(layout.nbytes)
        page, descriptor = FlagPage.create()
        box = Box(layout, region, page)
        try:
            self._memory.register(page)
        except MailboxRefused:
            region.close()
            os.close(descriptor)
            raise
        self._descriptors[box] = descriptor
        return box

    def descriptor_of(self, box: Box) -> int:
        """The file descriptor of its flags, until it is retired."""
        return self._descriptors[box]

    def retire(self, box: Box, opened_by: int | None) -> None:
        """Free the memory of a link that has ended as soon as nobody uses it. Idempotent."""
        with self._lock:
            descriptor = self._descriptors.pop(box, None)
            if descriptor is None:
                return
            self._retired[box] = (self._memory.mark(), opened_by)
        os.close(descriptor)
        self.sweep()

    def sweep(self) -> int:
        """Free what is not used any more; how many are left."""
        with self._lock:
            for box, (mark, opened_by) in list(self._retired.items()):
                if opened_by is None or box.page.is_closed or not _lives(opened_by):
                    self._memory.wait(mark)
                    self._memory.forget(box.page)
                    box.region.close()
                    del self._retired[box]
            return len(self._retired)


def _lives(pid: int) -> bool:
    """Whether a process may still be there; one that is not seen from here (pid 0) may."""
    if pid <= 0:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
