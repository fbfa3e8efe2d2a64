"""The `ray` carrier: the call is run on the expert's own actor, found by name; rows travel as Ray objects.

Nothing but Ray's ports is needed, and the guard is Ray's: a process that may talk to the cluster can run code in any
actor, so the cluster token of `LinkOptions` would add nothing here and is not used. Calls to one actor are computed
one after another. An async actor (a Serve replica) computes them on its event loop: its health checks wait meanwhile.

Rows are passed by value: Ray itself moves large arguments to its object store. An explicit `ray.put` was measured to
double the time at 64 KiB and to bring no consistent gain from 256 KiB to 16 MiB, for rows have one receiver.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import list_named_actors

from moe_ray.core import AdapterRows, ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import (
    ConfigError,
    ExpertFailed,
    LinkBroken,
    LinkTimeout,
    ProtocolError,
    TransportError,
    WrongAnswer,
)
from moe_ray.pb import moe_ray_pb2 as pb
from moe_ray.transport import wire
from moe_ray.transport.base import ONE_BY_ONE, ExpertHandler, LinkOptions
from moe_ray.transport.checks import check_reply
from moe_ray.transport.pending import address_of, peer_name
from moe_ray.transport.serving import ANSWERED_ERRORS, answer
from moe_ray.transport.version import WIRE_VERSION, other_version

_SERVE_NAMESPACE = "serve"
_SERVE_REPLICA = "SERVE_REPLICA::"
_CLOSE_POLL_S = 0.1  # how soon a waiting thread notices that another one closed its link

_Answer = tuple[int, str, str, np.ndarray | None, tuple[int, int, int]]
"""status, error, dtype, rows, load: plain values, so that no exception of the actor's is pickled."""

_SERVERS: dict[str, RayExpertServer] = {}
"""Address → open server of this process. Only `RayExpertServer` writes to it; `_serve_call` reads it."""


class RayExpertServer:
    """`base.ExpertServer`: makes `handler` callable on the actor that this process is, until `close`."""

    def __init__(self, handler: ExpertHandler) -> None:
        """Register under this actor's "namespace/name". Raises `ConfigError` outside of a named actor."""
        self.handler = handler
        self.address = own_address()
        _SERVERS[self.address] = self

    def close(self) -> None:
        """Answer no more calls. Idempotent."""
        if _SERVERS.get(self.address) is self:
            del _SERVERS[self.address]


def own_address() -> str:
    """ "namespace/name" under which `ray.get_actor` finds the calling actor. Raises `ConfigError` if it has none.

    Ray tells an actor its name but only the job's namespace, so candidates are compared with the actor itself.
    """
    context = ray.get_runtime_context()
    inside = ray.is_initialized() and context.get_actor_id() is not None
    name = context.get_actor_name() if inside else None
    if not name:
        raise ConfigError("the ray carrier needs a named Ray actor around the expert (a Serve replica is one)")
    likely = _SERVE_NAMESPACE if name.startswith(_SERVE_REPLICA) else context.namespace
    others = (each["namespace"] for each in list_named_actors(all_namespaces=True) if each["name"] == name)
    for namespace in itertools.chain([likely], others):
        try:
            found = ray.get_actor(name, namespace)
        except ValueError:
            continue
        if found == context.current_actor and "/" not in namespace:
            return f"{namespace}/{name}"
    raise ConfigError(f"Ray does not find the actor {name!r} by its name (a namespace must not contain '/')")


class RayLink:
    """`base.Link` by actor calls. It learns that the actor died from a call: `broken` is not set before one fails."""

    group = ONE_BY_ONE
    on_card = False
    silent = False  # Ray tells when the actor is gone

    def __init__(self, info: ReplicaInfo, options: LinkOptions | None = None) -> None:
        """Find the actor and wait for its first answer, `connect_timeout_s` at most. Raises `LinkBroken`."""
        timeout_s = (options or LinkOptions()).connect_timeout_s
        self.info = info
        self.peer = peer_name(info, "ray")
        self._address = address_of(info, "ray")
        self._ids = itertools.count(1)
        self.reason: str | None = None
        if not ray.is_initialized():
            raise LinkBroken(f"{self.peer}: this process is not connected to a Ray cluster")
        namespace, _, name = self._address.partition("/")
        try:
            self._actor = ray.get_actor(name, namespace)
            version = int(ray.get(self._actor.__ray_call__.remote(_is_serving, self._address), timeout=timeout_s))
        except GetTimeoutError:
            raise self.broke(f"no answer within {timeout_s:g} s") from None
        except (RayError, ValueError) as error:
            raise self.broke(_first_line(error)) from None
        if not version:
            raise self.broke("the actor serves no expert")
        if version != WIRE_VERSION:
            raise self.broke(str(other_version(version)))

    @property
    def broken(self) -> bool:
        return self.reason is not None

    def probe(self) -> None:
        """Nothing: only a call tells."""

    def send(self, call: ExpertCall) -> RayPending:
        """Submit `call` to the actor. Raises `LinkBroken` or `InvalidCall`."""
        wire.check_call(call)
        if self.reason is not None:
            raise LinkBroken(self.reason)
        call.call_id = next(self._ids)
        dtype, rows = wire.to_numpy(call.rows)
        weights = call.weights.detach().cpu().contiguous().numpy()
        try:
            ref = self._actor.__ray_call__.remote(
                *(_serve_call, self._address, call.call_id, call.layer, call.expert),
                *(dtype, rows, weights, [(run.adapter_id, run.count) for run in call.adapters]),
            )
        except RayError as error:
            raise self.broke(_first_line(error)) from None
        return RayPending(self, call, ref)

    def close(self) -> None:
        """End the link: pending replies fail within a tenth of a second. The actor lives on. Idempotent."""
        self.broke("link closed")

    def broke(self, reason: str) -> LinkBroken:
        """Mark the link broken, unless it is already, and return the error to raise."""
        if self.reason is None:
            self.reason = f"{self.peer}: {reason}"
        return LinkBroken(self.reason)


class RayPending:
    """`base.PendingReply` on an object ref."""

    def __init__(self, link: RayLink, call: ExpertCall, ref: ray.ObjectRef) -> None:
        self._link = link
        self._call = call
        self._call_id = call.call_id
        self._ref = ref

    def result(self, timeout_s: float) -> ExpertReply:
        """Wait for the reply. Errors as in `base.PendingReply.result`."""
        peer = self._link.peer
        status, message, dtype, rows, load = self._wait(timeout_s)
        if status == _GONE:
            raise self._link.broke("the replica closed")
        try:
            if status != pb.OK or rows is None:
                raise wire.error_of(status, message)
            reply = ExpertReply(self._call_id, wire.from_numpy(dtype, rows, "rows"), ReplicaLoad(*load))
            return check_reply(self._call, reply)
        except ProtocolError as error:
            raise WrongAnswer(f"{peer}: {error}") from None
        except TransportError as error:
            raise type(error)(f"{peer}: {error}") from None

    def cancel(self) -> None:
        """Wait no more. Idempotent.

        The replica computes the call nevertheless. `ray.cancel` drops one that queues, but after that an actor of ray
        2.60 has been seen to answer no call any more.
        """

    def _wait(self, timeout_s: float) -> _Answer:
        call, link = self._call, self._link
        deadline = time.monotonic() + max(timeout_s, 0.0)
        while link.reason is None:
            left = deadline - time.monotonic()
            try:
                return ray.get(self._ref, timeout=min(max(left, 0.0), _CLOSE_POLL_S))
            except GetTimeoutError:
                if left <= _CLOSE_POLL_S:
                    raise LinkTimeout(
                        f"{link.peer} did not answer layer {call.layer} expert {call.expert} within {timeout_s:g} s"
                    ) from None
            except RayTaskError as error:
                raise ExpertFailed(f"{link.peer}: {type(error.cause).__name__}: {error.cause}") from None
            except RayError as error:
                raise link.broke(_first_line(error)) from None
        raise LinkBroken(link.reason)


_GONE = -1  # status of a call to an actor whose server is closed


def _is_serving(_actor: Any, address: str) -> int:
    """The wire version that the actor serves; 0: no expert. (A process of version 1 answers True or False.)"""
    return WIRE_VERSION if address in _SERVERS else 0


def _serve_call(
    _actor: Any,
    address: str,
    call_id: int,
    layer: int,
    expert: int,
    dtype: str,
    rows: np.ndarray,
    weights: np.ndarray,
    adapters: Sequence[tuple[int, int]],
) -> _Answer:
    """Compute one call; runs on the actor."""
    server = _SERVERS.get(address)
    if server is None:
        return _GONE, "", "", None, (0, 0, 0)
    try:
        tensors = wire.from_numpy(dtype, rows, "rows"), wire.weights_from_numpy(weights)
        call = ExpertCall(layer, expert, *tensors, call_id, adapters=tuple(AdapterRows(*run) for run in adapters))
        wire.check_call(call)
        reply = answer(server.handler, call)
    except ANSWERED_ERRORS as error:
        return wire.status_of(error), str(error), "", None, (0, 0, 0)
    load = reply.load
    name, array = wire.to_numpy(reply.rows)
    return pb.OK, "", name, array, (load.queued_rows, load.compute_us, load.queue_us)


def _first_line(error: Exception) -> str:
    """Ray's messages are pages long; their first line says it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
