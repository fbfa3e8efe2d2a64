"""Mailboxes of the card that this process computes on, where it can have any; where not, the log says why."""

from __future__ import annotations

import logging
from functools import lru_cache

from moe_ray.errors import MailboxRefused
from moe_ray.transport.base import ExpertHandler, LinkOptions
from moe_ray.transport.mailbox.expert_end import MailboxExpertServer
from moe_ray.transport.mailbox.memory import DeviceMemory
from moe_ray.transport.mailbox.trunk_end import CardMailboxes

logger = logging.getLogger(__name__)


def card_mailboxes(device: str) -> CardMailboxes | None:
    """Those of a trunk on this device; None: its rows go over sockets."""
    memory = _memory(device)
    return None if memory is None else CardMailboxes(memory)


def mailbox_server(handler: ExpertHandler, device: str, options: LinkOptions) -> MailboxExpertServer | None:
    """The server of an expert on this device, beside that of its socket; None: it takes rows on sockets."""
    memory = _memory(device)
    return None if memory is None else MailboxExpertServer(handler, memory, options)


@lru_cache
def _memory(device: str) -> DeviceMemory | None:
    """That of the card, once for this process."""
    try:
        if device != "cuda":
            raise MailboxRefused(f"this process computes on {device}")
        from moe_ray.transport.mailbox.cuda_memory import CudaMemory

        return CudaMemory()
    except MailboxRefused as error:
        logger.warning("no mailboxes on a card, rows go over sockets: %s", error)
        return None
