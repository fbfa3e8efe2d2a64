"""The one interface behind which an `ExpertCall` travels; each carrier is a file beside this one.

A carrier has two ends. The trunk's end is a `Link` to one replica: `send` puts a call on its way and returns at once
with a `PendingReply`, whose `result` waits. The replica's end is an `ExpertServer` that hands each call to an
`ExpertHandler`. A link never retries, never chooses and never hides a fault: that is the pool's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import ConfigError, ProtocolError, TransportError

if TYPE_CHECKING:
    import torch

ExpertHandler = Callable[[ExpertCall], ExpertReply]
"""Computes a call on the calling thread. Thread-safe. Raises `ExpertFailed`, `ProtocolError`, `CallCancelled`."""


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


class PendingReply(Protocol):
    """A reply under way."""

    def result(self, timeout_s: float) -> ExpertReply:
        """Wait for the reply, from the thread that sent the call; again, if need be, after a `LinkTimeout` only.

        Raises `LinkBroken` when the link ended first, `LinkTimeout` after `timeout_s`, `ExpertFailed` when the
        replica could not compute the call, `ProtocolError` when the reply does not fit the call. A reply that nobody
        waits for any more is dropped when it comes.
        """
        ...

    def cancel(self) -> None:
        """Wait no more. A replica that has not begun the call skips it, where the carrier can tell it in time.

        Never blocks. Idempotent.
        """
        ...


class Replies(Protocol):
    """The replies of calls that were sent together; they come into `rows`."""

    rows: torch.Tensor  # [R, D] in the order of the calls

    def wait(self, timeout_s: float) -> list[ReplicaLoad | TransportError | None]:
        """Wait for all, `timeout_s` at most; per call its replica's load, or why its rows are not there.

        None: the reply is still under way, and may be waited for again.
        """
        ...

    def forget(self, index: int | None = None) -> None:
        """Stop waiting for one call, or for all: its rows are not written to from now on. Idempotent."""
        ...

    def cancel(self, index: int) -> None:
        """Forget one call as `PendingReply.cancel` does."""
        ...


class Together(Protocol):
    """A way to call several replicas at once. Links whose `together` are equal can be called so."""

    def scatter(
        self,
        links: Sequence[Link],
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        rows: torch.Tensor,
        weights: torch.Tensor,
    ) -> Replies:
        """Send call i, `counts[i]` of rows [R, D] and weights [R] in order, on links[i].

        Raises `ProtocolError` when no carrier could carry the rows; a link that fails says so in `wait`.
        """
        ...


class Link(Protocol):
    """One live connection from a trunk to one expert replica."""

    info: ReplicaInfo

    @property
    def together(self) -> Together | None:
        """How calls on several such links travel at once; None: one by one."""
        ...

    @property
    def broken(self) -> bool:
        """True once the link can carry no more calls; it stays so (connect anew)."""
        ...

    @property
    def silent(self) -> bool:
        """True while the other machine does not even acknowledge what it was sent, where the carrier can know."""
        ...

    def probe(self) -> None:
        """Look whether the other end is there: `broken` tells if it ended the link, `silent`, a second later, the rest.

        For a machine that took a call and then went away owes no acknowledgement, it is sent something small, if that
        takes no waiting. From any thread; raises nothing.
        """
        ...

    def send(self, call: ExpertCall) -> PendingReply:
        """Put `call` on its way without waiting for its result. Sets `call.call_id`.

        Raises `LinkBroken`, or `ProtocolError` when no carrier could carry the call (shape, dtype, size).
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


def check_reply(call: ExpertCall, reply: ExpertReply) -> ExpertReply:
    """Return `reply` if it fits `call` in shape, dtype and finiteness; else raise `ProtocolError`."""
    if reply.rows.shape != call.rows.shape or reply.rows.dtype != call.rows.dtype:
        raise ProtocolError(
            f"reply to layer {call.layer} expert {call.expert} is {reply.rows.dtype} {list(reply.rows.shape)}, "
            f"expected {call.rows.dtype} {list(call.rows.shape)}"
        )
    # One reduction instead of isfinite().all(): a sum is NaN or infinite if any element is. Summing in
    # float32 cannot overflow for values a float16 or bfloat16 network can produce.
    if not math.isfinite(float(reply.rows.detach().sum(dtype=_sum_dtype(call)))):
        raise ProtocolError(f"reply to layer {call.layer} expert {call.expert} is not finite (NaN or Inf)")
    return reply


def _sum_dtype(call: ExpertCall):  # type: ignore[no-untyped-def]
    import torch

    return torch.float64 if call.rows.dtype == torch.float32 else torch.float32


def check_carrier(name: str, allowed: tuple[str, ...]) -> str:
    """Return `name` if it is a known carrier; else raise `ConfigError` naming the allowed ones."""
    if name not in allowed:
        raise ConfigError(f"transport {name!r} is not one of {', '.join(allowed)}")
    return name
