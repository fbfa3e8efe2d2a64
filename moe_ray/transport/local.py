"""The `local` carrier: trunk and expert in one process. Rows are handed over as they are, on whatever device they are.

There is no wire and no second thread: a call is computed when its result is asked for, on the thread that asks. One
thread then owns all compute, as one process should; a thread per expert would bring its own pool of compute threads.
So a call cannot time out, and ending the link does not interrupt the one being computed.
"""

from __future__ import annotations

import itertools
import uuid
import weakref

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo
from moe_ray.errors import LinkBroken, TransportError
from moe_ray.transport import wire
from moe_ray.transport.base import ONE_BY_ONE, ExpertHandler
from moe_ray.transport.checks import check_reply
from moe_ray.transport.pending import address_of
from moe_ray.transport.serving import answer

_SERVERS: weakref.WeakValueDictionary[str, LocalExpertServer] = weakref.WeakValueDictionary()
"""Address → open server of this process. Only `LocalExpertServer` writes to it."""


class LocalPending:
    """`base.PendingReply` that computes."""

    __slots__ = ("_call", "_link")

    def __init__(self, link: LocalLink, call: ExpertCall) -> None:
        self._link, self._call = link, call

    def result(self, timeout_s: float) -> ExpertReply:
        """Compute the call on this thread. Errors as in `base.PendingReply.result`, except for `LinkTimeout`."""
        link = self._link
        if link.reason is not None:
            raise LinkBroken(link.reason)
        try:
            return check_reply(self._call, answer(link.handler, self._call))
        except TransportError as error:
            raise type(error)(f"{link.peer}: {error}") from None

    def cancel(self) -> None:
        """Nothing to do: only a result that is asked for is computed."""


class LocalLink:
    """`base.Link` to a handler in this process."""

    group = ONE_BY_ONE
    on_card = False
    silent = False

    def __init__(self, info: ReplicaInfo, handler: ExpertHandler) -> None:
        self.info, self.handler = info, handler
        self.peer = f"expert replica {info.replica_id} in this process"
        self.reason: str | None = None
        self._ids = itertools.count(1)

    @property
    def broken(self) -> bool:
        return self.reason is not None

    def probe(self) -> None:
        """Nothing: a server of this process breaks its links when it closes."""

    def send(self, call: ExpertCall) -> LocalPending:
        """Note `call` for its result to be asked for. Raises `LinkBroken`, `InvalidCall`."""
        wire.check_call(call)
        if self.reason is not None:
            raise LinkBroken(self.reason)
        call.call_id = next(self._ids)
        return LocalPending(self, call)

    def close(self, reason: str = "link closed") -> None:
        """End the link. Idempotent."""
        if self.reason is None:
            self.reason = f"{self.peer}: {reason}"


class LocalExpertServer:
    """Makes a handler reachable by `connect("local", info)` in this process, under an address that is unique."""

    def __init__(self, handler: ExpertHandler) -> None:
        self.handler = handler
        self.address = uuid.uuid4().hex
        self._links: weakref.WeakSet[LocalLink] = weakref.WeakSet()
        _SERVERS[self.address] = self

    def connect(self, info: ReplicaInfo) -> LocalLink:
        """Open a link that lives at most as long as this server."""
        link = LocalLink(info, self.handler)
        self._links.add(link)
        return link

    def close(self) -> None:
        """Take no more links and break the open ones. Idempotent."""
        _SERVERS.pop(self.address, None)
        for link in list(self._links):
            link.close("the replica closed")


def serves(address: str) -> bool:
    """Whether `address` is an open local server of this very process."""
    return address in _SERVERS


def connect_local(info: ReplicaInfo) -> LocalLink:
    """Open a link to the local server at the replica's address. Raises `LinkBroken` if this process has none."""
    server = _SERVERS.get(address_of(info, "local"))
    if server is None:
        raise LinkBroken(f"expert replica {info.replica_id} is not (or no more) in this process")
    return server.connect(info)
