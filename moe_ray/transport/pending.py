"""The calls in flight on one link: which thread waits for which reply, and how all fail at once when the link ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import ConfigError, LinkBroken, LinkTimeout, ProtocolError, TransportError, WrongAnswer
from moe_ray.transport.checks import check_reply

M = TypeVar("M")
"""What the carrier delivers for a call, before it is decoded."""


def address_of(info: ReplicaInfo, carrier: str) -> str:
    """Return the replica's address on `carrier`; raise `ConfigError` if it does not offer it."""
    address = info.addresses.get(carrier)
    if not address:
        offered = ", ".join(sorted(info.addresses)) or "none"
        raise ConfigError(f"expert replica {info.replica_id} has no {carrier} address (it offers: {offered})")
    return address


def peer_name(info: ReplicaInfo, carrier: str) -> str:
    """How the replica is named in this carrier's error messages."""
    return f"expert replica {info.replica_id} at {carrier}://{address_of(info, carrier)}"


class Pending(Generic[M]):
    """A reply in flight (`base.PendingReply`): set once by the link's thread, waited for by the caller's."""

    __slots__ = ("_broken", "_call", "_done", "_message", "_table", "call_id")

    def __init__(self, table: CallTable[M], call: ExpertCall, call_id: int) -> None:
        self.call_id = call_id
        self._table = table
        self._call = call
        self._message: M | None = None
        self._broken: str | None = None
        # A bare lock, held until the outcome is there: the cheapest way that CPython has to wake one thread.
        self._done = threading.Lock()
        self._done.acquire()

    def settle(self, message: M | None, broken: str | None = None) -> None:
        """Set the outcome and wake the waiter. Called once, by the table."""
        self._message = message
        self._broken = broken
        self._done.release()

    def result(self, timeout_s: float) -> ExpertReply:
        """Wait for the reply, decode and check it on this thread. Errors as in `base.PendingReply.result`."""
        call, peer = self._call, self._table.peer
        if not self._done.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)):
            raise LinkTimeout(f"{peer} did not answer layer {call.layer} expert {call.expert} within {timeout_s:g} s")
        message, self._message = self._message, None
        if message is None:
            raise LinkBroken(self._broken or f"{peer}: link closed")
        try:
            return check_reply(call, self._table.decode(message))
        except ProtocolError as error:
            raise WrongAnswer(f"{peer}: {error}") from None
        except TransportError as error:
            raise type(error)(f"{peer}: {error}") from None

    def cancel(self) -> None:
        """Wait no more. The replica computes the call nevertheless: these carriers read one call after the other."""


class CallTable(Generic[M]):
    """Owns a link's pending replies and its state. Thread-safe; once broken it stays so, with the first reason."""

    def __init__(self, peer: str, decode: Callable[[M], ExpertReply]) -> None:
        self.peer = peer
        self.decode = decode
        self._lock = threading.Lock()
        self._ids = itertools.count(1)  # 0 is what a message without a header says
        self._pending: dict[int, Pending[M]] = {}
        self._broken: str | None = None

    @property
    def broken(self) -> str | None:
        """Why the link can carry no more calls, or None."""
        return self._broken

    def open(self, call: ExpertCall) -> Pending[M]:
        """Give `call` its id and a place in the table. Raises `LinkBroken`."""
        with self._lock:
            if self._broken is not None:
                raise LinkBroken(self._broken)
            call.call_id = next(self._ids)
            pending = self._pending[call.call_id] = Pending(self, call, call.call_id)
        return pending

    def settle(self, call_id: int, message: M) -> bool:
        """Hand `message` to the call that waits for it; False if there is no such call."""
        with self._lock:
            pending = self._pending.pop(call_id, None)
        if pending is None:
            return self._broken is not None  # a reply that crossed our own close() is no fault
        pending.settle(message)
        return True

    def fail(self, reason: str) -> None:
        """Break the link: everything in flight, and every later call, fails with `LinkBroken`. Idempotent."""
        with self._lock:
            if self._broken is None:
                self._broken = f"{self.peer}: {reason}"
            lost, self._pending = self._pending, {}
        for pending in lost.values():
            pending.settle(None, self._broken)
