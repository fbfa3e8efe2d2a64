"""The one interface behind which an `ExpertCall` travels; each carrier is a file beside this one.

A carrier has two ends. The trunk's end is a `Link` to one replica, and a `GroupSender` that sends the calls of one
layer on several links in one step: `scatter` returns at once with `Replies`, whose `wait` waits. The replica's end is
an `ExpertServer` that hands each call to an `ExpertHandler`. A link never retries, never selects a replica and never
hides a fault: that is the dispatcher's work.

>>> replies = scatter([link_a, link_b], CallBatch(layer=0, experts=[3, 6], counts=[2, 3], rows=rows, weights=weights))
>>> replies.wait(timeout_s=1.0)  # per call: the replica's load, an error, or None while it is in flight
[ReplicaLoad(...), ReplicaLoad(...)]
>>> replies.rows()  # [5, D], in the order of the calls
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from moe_ray.core import AdapterRows, ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import LinkBroken, LinkTimeout, TransportError

if TYPE_CHECKING:
    import torch

MAILBOX_ADDRESS: Final = "ipc"
"""Beside a replica's address for `socket`: where it takes rows in memory of the card that it computes on."""

ExpertHandler = Callable[[ExpertCall], ExpertReply]
"""Computes a call on the calling thread. Thread-safe.

Raises `ExpertFailed`, `CallRefused`, `ReplicaBusy` or `CallCancelled`.
"""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS between trunk and experts."""

    certificate: str
    key: str
    ca: str
    server_name: str | None = None
    """The name in the experts' certificates; None: the host they are connected to (pods have no lasting one)."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """What both ends of a link agree on. `token` guards the port: a peer that does not show it is refused."""

    token: str | None = None
    tls: TlsFiles | None = None
    connect_timeout_s: float = 5.0
    keepalive_s: float = 10.0
    """A peer silent for this long is pinged; without an answer in half of it the link is broken."""
    native_dir: Path | None = None
    """Where native code is built and kept; None: carriers do without."""
    mailboxes: Mailboxes | None = None
    """Memory of this trunk's card for rows of experts on the same card; None: rows go over sockets."""


class Mailboxes(Protocol):
    """`mailbox.trunk_end.CardMailboxes`."""

    def link_to(self, info: ReplicaInfo, options: LinkOptions) -> Link | None:
        """A link whose rows go through the card's memory; None: it was refused, and that has been said."""
        ...


class PendingReply(Protocol):
    """The reply of one call in flight."""

    def result(self, timeout_s: float) -> ExpertReply:
        """Wait for the reply, from the thread that sent the call; again, if need be, after a `LinkTimeout` only.

        Raises `LinkBroken` when the link ended first, `LinkTimeout` after `timeout_s`, `ExpertFailed` when the
        replica could not compute the call, `CallRefused` or `ReplicaBusy` when it did not accept it, `WrongAnswer`
        when the reply does not fit the call. A reply that is not waited for any more is dropped when it arrives.
        """
        ...

    def cancel(self) -> None:
        """Wait no more. A replica that has not begun the call skips it, where the carrier can tell it in time.

        Never blocks. Idempotent.
        """
        ...


@dataclass(slots=True, eq=False)
class CallBatch:
    """Calls of one layer whose rows lie one call behind the other: call i has `counts[i]` rows for `experts[i]`."""

    layer: int
    experts: Sequence[int]
    counts: Sequence[int]
    rows: torch.Tensor  # [R, D], R = sum(counts)
    weights: torch.Tensor  # [R] float32
    adapters: Sequence[tuple[AdapterRows, ...]] = ()
    """Of each call, as `ExpertCall.adapters`. Empty: no call has any."""
    out: torch.Tensor | None = None  # [R, D]
    """Memory of the host for the replies' rows, theirs alone while one may come; None: that of the carrier."""


Outcome = ReplicaLoad | TransportError | None
"""Of one call: it was answered; it has failed; None: it is in flight."""


class Replies(Protocol):
    """The replies of one `scatter`."""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Wait until each call is answered or has failed, `timeout_s` at most; the outcome of each call."""
        ...

    def rows(self) -> torch.Tensor:
        """The rows of all calls, [R, D] in the order of the calls, once each was answered."""
        ...

    def rows_of(self, index: int) -> torch.Tensor:
        """The rows of one call that was answered, [counts[index], D]."""
        ...

    def forget(self, index: int | None = None) -> None:
        """Stop waiting for one call, or for all: no reply is written to their rows from now on. Idempotent."""
        ...

    def cancel(self, index: int) -> None:
        """Forget one call; a replica that has not begun it skips it, where the carrier can tell it in time."""
        ...


class GroupSender(Protocol):
    """Sends on several links in one step. Links whose `group` are equal can be sent on together."""

    def scatter(self, links: Sequence[Link], batch: CallBatch) -> Replies:
        """Send call i on links[i], without waiting. A broken link is an outcome of `Replies.wait`.

        Raises `InvalidCall` when no carrier could carry the rows; then nothing is in flight.
        """
        ...


def scatter(links: Sequence[Link], batch: CallBatch) -> Replies:
    """Send call i of `batch` on links[i]: in one step where the links' carrier can, else one after the other.

    Raises `InvalidCall` as `GroupSender.scatter`.
    """
    group = links[0].group if links else ONE_BY_ONE
    if any(link.group != group for link in links):
        group = ONE_BY_ONE
    return group.scatter(links, batch)


class Link(Protocol):
    """One live connection from a trunk to one expert replica."""

    info: ReplicaInfo
    on_card: bool
    """Whether rows that are on this process's card are sent, and answered, without going through the host's memory."""

    @property
    def group(self) -> GroupSender:
        """How calls on several such links are sent in one step; `ONE_BY_ONE` where the carrier has no faster way."""
        ...

    @property
    def broken(self) -> bool:
        """True once the link can carry no more calls; it stays so (connect anew)."""
        ...

    @property
    def silent(self) -> bool:
        """True while the other machine does not acknowledge what it was sent, where the carrier can know that."""
        ...

    def probe(self) -> None:
        """Check the other end: `broken` is then true if it ended the link, `silent`, a second later, if it is cut off.

        A machine that acknowledged a call and was then cut off owes no acknowledgement, so a small message is sent, if
        that needs no waiting. From any thread; raises nothing.
        """
        ...

    def send(self, call: ExpertCall) -> PendingReply:
        """Put `call` on its way without waiting for its result. Sets `call.call_id`.

        Raises `LinkBroken`, or `InvalidCall` when no carrier could carry the call (shape, dtype, size).
        """
        ...

    def close(self) -> None:
        """End the link; pending replies fail with `LinkBroken`. Idempotent."""
        ...


class ExpertServer(Protocol):
    """The replica's end of a carrier."""

    address: str

    def close(self) -> None:
        """Stop accepting, end every connection. Idempotent."""
        ...


class OneByOne:
    """`GroupSender` of links that send one call at a time."""

    def scatter(self, links: Sequence[Link], batch: CallBatch) -> OneByOneReplies:
        """Send call i on links[i]. Raises `InvalidCall`, and then cancels the calls that were sent."""
        replies = OneByOneReplies(batch.out)
        start = 0
        try:
            adapters = batch.adapters or [()] * len(links)
            for link, expert, count, runs in zip(links, batch.experts, batch.counts, adapters, strict=True):
                part = slice(start, start + count)
                rows = batch.rows[part]
                replies.add(link, ExpertCall(batch.layer, expert, rows, batch.weights[part], adapters=runs))
                start += count
        except BaseException:
            replies.forget()
            raise
        return replies


ONE_BY_ONE: Final = OneByOne()


class OneByOneReplies:
    """`Replies` over a `PendingReply` for each call."""

    def __init__(self, out: torch.Tensor | None = None) -> None:
        """`out`: where the rows of all calls are put together."""
        self._out = out
        self._pending: list[PendingReply | None] = []
        """None: the outcome is known, or the call is not waited for."""
        self._outcomes: list[Outcome] = []
        self._rows: list[torch.Tensor | None] = []

    def add(self, link: Link, call: ExpertCall) -> None:
        """Send one more call. Raises `InvalidCall`."""
        pending: PendingReply | None = None
        outcome: Outcome = None
        try:
            pending = link.send(call)
        except LinkBroken as error:
            outcome = error
        self._pending.append(pending)
        self._outcomes.append(outcome)
        self._rows.append(None)

    def wait(self, timeout_s: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_s
        for index, pending in enumerate(self._pending):
            if pending is None:
                continue
            try:
                reply = pending.result(max(0.0, deadline - time.monotonic()))
            except LinkTimeout:
                continue
            except TransportError as error:
                self._outcomes[index] = error
            else:
                self._outcomes[index] = reply.load
                self._rows[index] = reply.rows
            self._pending[index] = None
        return list(self._outcomes)

    def rows(self) -> torch.Tensor:
        import torch

        rows = [self.rows_of(index) for index in range(len(self._rows))]
        if self._out is not None:
            return torch.cat(rows, out=self._out)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def rows_of(self, index: int) -> torch.Tensor:
        rows = self._rows[index]
        assert rows is not None, f"call {index} was not answered"
        return rows

    def forget(self, index: int | None = None) -> None:
        for i in range(len(self._pending)) if index is None else (index,):
            self._pending[i] = None

    def cancel(self, index: int) -> None:
        pending = self._pending[index]
        self._pending[index] = None
        if pending is not None:
            pending.cancel()
