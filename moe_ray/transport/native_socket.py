"""The trunk's end of the `socket` carrier in C++: the same frames, and all calls of a layer in one step.

`socket.SocketLink` does the same in Python, where there is no compiler, and over TLS. What counts here is not that the
interpreter is slow but that it is large: after experts have streamed their weights through the caches, every layer
would start by reading it back from memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import KernelsUnavailable, LinkBroken, LinkTimeout, ProtocolError, TransportError, WrongAnswer
from moe_ray.native.links import BROKEN, DONE, WAITING, Links, Result
from moe_ray.transport import wire
from moe_ray.transport.adapter_runs import check_runs
from moe_ray.transport.base import CallBatch, Link, LinkOptions, Outcome
from moe_ray.transport.handshake import OVER, connect, is_over, is_silent
from moe_ray.transport.pending import address_of, peer_name

_LOADING: Final = threading.Lock()


def links_library(cache_dir: Path) -> Links | None:
    """The library, once for this process, from any thread; None where it cannot be built.

    Links of one library are sent on together, and a trunk connects to its experts from many threads at once.
    """
    with _LOADING:
        return _loaded(cache_dir)


@lru_cache
def _loaded(cache_dir: Path) -> Links | None:
    try:
        return Links(cache_dir)
    except KernelsUnavailable:
        return None


class NativeSocketLink:
    """`base.Link` over one connection; the thread that waits receives."""

    on_card = False

    def __init__(self, info: ReplicaInfo, options: LinkOptions, library: Links) -> None:
        """Connect and prove the token, `connect_timeout_s` at most. Raises `LinkBroken`."""
        self.info, self.peer = info, peer_name(info, "socket")
        self.reason: str | None = None
        self.group = NativeGroup(library)
        self.library, self.ids = library, itertools.count(1)
        try:
            self._sock = connect(address_of(info, "socket"), options)
        except (OSError, EOFError, ProtocolError) as error:
            raise LinkBroken(f"{self.peer}: {getattr(error, 'strerror', None) or error}") from None
        self._sock.setblocking(False)
        self.handle = library.open(self._sock.fileno())

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.free(self.handle)
            self.handle = 0  # replies that die in one cycle with their link may come after it
            self._sock.close()

    @property
    def broken(self) -> bool:
        return self.reason is not None

    @property
    def silent(self) -> bool:
        return self.reason is None and is_silent(self._sock)

    def probe(self) -> None:
        """`base.Link.probe`."""
        if is_over(self._sock):
            self.broke(OVER)
        else:
            self.library.ping(self.handle)

    def send(self, call: ExpertCall) -> NativePending:
        """Write `call`, receiving replies while the peer takes no more. Raises `LinkBroken`, `InvalidCall`."""
        wire.check_call(call)
        if self.reason is not None:
            raise LinkBroken(self.reason)
        count = call.rows.shape[0]
        batch = CallBatch(call.layer, [call.expert], [count], call.rows, call.weights, (call.adapters,))
        replies = self.group.scatter([self], batch)
        call.call_id = replies.ids[0]
        return NativePending(self.peer, call, replies)

    def close(self) -> None:
        """End the link; a thread that waits on it is woken. Idempotent, from any thread."""
        self.broke("link closed")

    def broke(self, why: str) -> LinkBroken:
        """Note that the link is broken, if that is news."""
        if self.reason is None:
            self.reason = f"{self.peer}: {why}"
            self.library.fail(self.handle, why)
        return LinkBroken(self.reason)

    def failure(self, call_id: int, result: Result, asked: str, rows: torch.Tensor) -> TransportError:
        """Why a call that `asked` for the like of `rows` has none; the call is over."""
        if result.outcome == BROKEN:
            self.library.forget(self.handle, call_id)
            return self.broke(self.library.reason(self.handle) or "broken")
        error: TransportError = wire.error_of(result.status, self.library.error(self.handle, call_id))
        if result.misfit:
            shape = f"{wire.dtype_name(result.dtype)} [{result.num_rows}, {result.hidden_size}]"
            error = WrongAnswer(f"reply to {asked} is {shape}, expected {rows.dtype} {list(rows.shape)}")
        elif result.infinite:
            error = WrongAnswer(f"reply to {asked} is not finite (NaN or Inf)")
        self.library.forget(self.handle, call_id)
        return type(error)(f"{self.peer}: {error}")


class NativeGroup:
    """`base.GroupSender`: the calls of one layer on several native links, in one step."""

    def __init__(self, library: Links) -> None:
        self._library = library

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NativeGroup) and other._library is self._library

    def __hash__(self) -> int:
        return id(self._library)

    def scatter(self, links: Sequence[Link], batch: CallBatch) -> NativeReplies:
        """Send call i of `batch` on links[i]. Raises `InvalidCall`."""
        wire.check_rows(batch.rows, "rows")
        for runs, count in zip(batch.adapters, batch.counts, strict=bool(batch.adapters)):
            check_runs(runs, count)
        native: list[NativeSocketLink] = links  # type: ignore[assignment]  # whose `group` this is
        rows = wire.sendable(batch.rows)
        weights = wire.sendable(batch.weights)
        ids = [next(link.ids) for link in native]
        target = torch.empty_like(rows) if batch.out is None else batch.out
        replies = NativeReplies(self._library, native, ids, batch, target)
        self._library.scatter(
            *([link.handle for link in native], ids, batch.layer, batch.experts, batch.counts),
            *(
                wire.dtype_code(rows),
                rows,
                weights,
                target,
                tuple([(run.adapter_id, run.count) for run in runs] for runs in batch.adapters),
            ),
        )
        return replies


class NativeReplies:
    """`base.Replies`: the replies of one scatter, received straight into one tensor [R, D]."""

    __slots__ = ("_counts", "_experts", "_layer", "_library", "_links", "_outcomes", "_rows", "_waiting", "ids")

    def __init__(
        self,
        library: Links,
        links: list[NativeSocketLink],
        ids: list[int],
        batch: CallBatch,
        rows: torch.Tensor,
    ) -> None:
        # Not the batch itself: the rows that were sent need not outlive their sending.
        self._library, self._links, self.ids, self._rows = library, links, ids, rows
        self._layer, self._experts, self._counts = batch.layer, batch.experts, batch.counts
        self._outcomes: list[Outcome] = [None] * len(ids)
        self._waiting = list(range(len(ids)))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """`base.Replies.wait`."""
        waiting, self._waiting = self._waiting, []
        handles = [self._links[i].handle for i in waiting]
        for i, result in zip(
            waiting, self._library.gather(handles, [self.ids[i] for i in waiting], timeout_s), strict=True
        ):
            if result.outcome == DONE:
                self._outcomes[i] = ReplicaLoad(result.queued_rows, result.compute_us, result.queue_us)
            elif result.outcome == WAITING:
                self._waiting.append(i)
            else:
                asked, rows = f"layer {self._layer} expert {self._experts[i]}", self._rows[: self._counts[i]]
                self._outcomes[i] = self._links[i].failure(self.ids[i], result, asked, rows)
        return list(self._outcomes)

    def rows(self) -> torch.Tensor:
        """`base.Replies.rows`."""
        return self._rows

    def rows_of(self, index: int) -> torch.Tensor:
        """`base.Replies.rows_of`."""
        start = sum(self._counts[:index])
        return self._rows[start : start + self._counts[index]]

    def forget(self, index: int | None = None) -> None:
        """`base.Replies.forget`."""
        for i in list(self._waiting) if index is None else [i for i in self._waiting if i == index]:
            self._waiting.remove(i)
            self._library.forget(self._links[i].handle, self.ids[i])

    def cancel(self, index: int) -> None:
        """`base.Replies.cancel`."""
        if index in self._waiting:
            self._waiting.remove(index)
            self._library.cancel(self._links[index].handle, self.ids[index])

    def __del__(self) -> None:
        self.forget()


class NativePending:
    """`base.PendingReply` of a single call."""

    __slots__ = ("_asked", "_call_id", "_peer", "_replies")

    def __init__(self, peer: str, call: ExpertCall, replies: NativeReplies) -> None:
        # Not the call itself: its rows need not outlive their sending.
        self._peer, self._call_id, self._replies = peer, call.call_id, replies
        self._asked = f"layer {call.layer} expert {call.expert}"

    def result(self, timeout_s: float) -> ExpertReply:
        """Wait for the reply. Errors as in `base.PendingReply.result`."""
        (outcome,) = self._replies.wait(timeout_s)
        if outcome is None:
            raise LinkTimeout(f"{self._peer} did not answer {self._asked} within {timeout_s:g} s")
        if isinstance(outcome, TransportError):
            raise outcome
        return ExpertReply(self._call_id, self._replies.rows(), outcome)

    def cancel(self) -> None:
        """Wait no more and let the replica skip the call. Idempotent."""
        self._replies.cancel(0)
