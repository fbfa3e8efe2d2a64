"""How trunk and replica agree on a mailbox, on a Unix socket that has proved the token: an offer, and its answer."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Final

from moe_ray.errors import MailboxRefused, ProtocolError
from moe_ray.transport.frames import LENGTH
from moe_ray.transport.handshake import PortKind
from moe_ray.transport.mailbox.memory import FlagPage
from moe_ray.transport.mailbox.ring import SlotLayout

MAILBOXES: Final = PortKind(b"moe-ray-mailbox", b"trunk", b"expert")
_MOST_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class MailboxOffer:
    """A trunk's memory, for a replica to open."""

    card: str
    handle: bytes
    layout: SlotLayout


def make_offer(sock: socket.socket, offer: MailboxOffer, flags: int) -> None:
    """Offer a mailbox with the flags' file descriptor. Raises `MailboxRefused` with the replica's reason, `OSError`."""
    told = {
        "card": offer.card,
        "handle": offer.handle.hex(),
        "slots": offer.layout.slots,
        "slot_bytes": offer.layout.slot_bytes,
    }
    data = json.dumps(told).encode()
    socket.send_fds(sock, [LENGTH.pack(len(data)) + data], [flags])
    refused = _read(sock, b"").get("refused")
    if refused != "":
        raise MailboxRefused(f"the replica refuses: {refused}")


def read_offer(sock: socket.socket) -> tuple[MailboxOffer, FlagPage]:
    """What a trunk offers, and its flags. Raises `ProtocolError`, `EOFError`, `OSError`."""
    first, descriptors, _, _ = socket.recv_fds(sock, _MOST_BYTES, 1)
    try:
        told = _read(sock, first)
        if len(descriptors) != 1:
            raise ProtocolError("an offer of a mailbox without flags")
        try:
            layout = SlotLayout(int(told["slots"]), int(told["slot_bytes"]))
            offer = MailboxOffer(str(told["card"]), bytes.fromhex(told["handle"]), layout)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"an offer of a mailbox that cannot be read: {error}") from None
        layout.check()
        return offer, FlagPage(descriptors[0])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def answer_offer(sock: socket.socket, refused: str) -> None:
    """Tell the trunk why its offer is refused; empty: it is taken."""
    data = json.dumps({"refused": refused[:1000]}).encode()
    sock.sendall(LENGTH.pack(len(data)) + data)


def _read(sock: socket.socket, data: bytes) -> dict[str, str]:
    """The message that begins with `data`."""
    while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        if len(data) >= LENGTH.size and LENGTH.unpack_from(data)[0] > _MOST_BYTES - LENGTH.size:
            raise ProtocolError("an offer of a mailbox that is too long")
        wanted = LENGTH.size if len(data) < LENGTH.size else LENGTH.size + LENGTH.unpack_from(data)[0]
        piece = sock.recv(wanted - len(data))
        if not piece:
            raise EOFError("the peer ended the handshake")
        data += piece
    try:
        told = json.loads(data[LENGTH.size :])
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ProtocolError("an offer of a mailbox that is no JSON object")
    return told
