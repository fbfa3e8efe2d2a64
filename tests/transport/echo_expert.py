"""An expert for the transport tests: `rows * weights`, or the fault that the call's expert number asks for.

Runs in a thread, in a Ray actor or Serve replica, and as a process: `echo_expert.py grpc|socket|card|cuda [token]`
prints its address (card, cuda: those of its socket and of its mailboxes) and ends with its stdin.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import torch

from moe_ray.core import ExpertCall, ExpertReply, ReplicaInfo, ReplicaLoad
from moe_ray.errors import AdapterNotHeld, CallRefused, ExpertFailed
from moe_ray.transport.base import ExpertServer, LinkOptions

ECHO, SLOW, FAILS, REFUSES, BUG, WRONG_SHAPE, NAN, WRONG_DTYPE, WRONG_ID, NO_TENSOR, ADAPTERS = range(11)
TOKEN = "the-cluster-token"
WAIT = "ECHO_WAIT_S"
"""The environment variable that says how long the card's stream waits for the rows of a call."""


def weighted(call: ExpertCall) -> torch.Tensor:
    return call.rows * call.weights[:, None].to(call.rows.dtype)


def behave(call: ExpertCall) -> ExpertReply:
    """The handler. SLOW takes `layer` milliseconds."""
    load = ReplicaLoad(queued_rows=call.layer, compute_us=11, queue_us=7)
    rows = weighted(call)
    if call.expert == SLOW:
        time.sleep(call.layer / 1000)
    elif call.expert == FAILS:
        raise ExpertFailed("out of luck")
    elif call.expert == REFUSES:
        raise CallRefused("key (0, 3) is not held here")
    elif call.expert == ADAPTERS:
        raise AdapterNotHeld(", ".join(f"{run.count} of {run.adapter_id}" for run in call.adapters) or "none")
    elif call.expert == BUG:
        raise ZeroDivisionError("a bug in the handler")
    elif call.expert == WRONG_SHAPE:
        rows = torch.cat([rows, rows])
    elif call.expert == NAN:
        rows[-1, -1] = float("nan")
    elif call.expert == WRONG_DTYPE:
        rows = rows.to(torch.bfloat16 if rows.dtype == torch.float16 else torch.float16)
    elif call.expert == WRONG_ID:
        return ExpertReply(call.call_id + 1, rows, load)
    elif call.expert == NO_TENSOR:
        rows = rows.to(torch.float64)
    return ExpertReply(call.call_id, rows, load)


def info(addresses: Mapping[str, str]) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id="echo-1",
        node_id="node",
        pid=os.getpid(),
        keys=frozenset({(0, 0)}),
        hidden_size=8,
        dtype="float32",
        addresses=addresses,
    )


class EchoActor:
    """A Ray actor or Serve deployment around `behave`."""

    def __init__(self) -> None:
        from moe_ray.transport.ray import RayExpertServer

        self.server: ExpertServer = RayExpertServer(behave)

    def endpoint(self) -> tuple[str, int]:
        return self.server.address, os.getpid()

    def close(self) -> None:
        self.server.close()
        self.server.close()


if __name__ == "__main__":
    from shared_device import SharedDevice

    from moe_ray.transport.grpc import GrpcExpertServer
    from moe_ray.transport.mailbox.expert_end import MailboxExpertServer
    from moe_ray.transport.socket import SocketExpertServer

    torch.set_num_threads(1)
    carrier, *token = sys.argv[1:]
    options = LinkOptions(token=token[0] if token else None)
    servers: list[ExpertServer] = []
    if carrier == "grpc":
        servers.append(GrpcExpertServer(behave, options=options))
    else:
        servers.append(SocketExpertServer(behave, options=options))
    if carrier == "card":
        servers.append(MailboxExpertServer(behave, SharedDevice(), options, wait_s=float(os.environ.get(WAIT, "1"))))
    if carrier == "cuda":
        from moe_ray.transport.mailbox.cuda_memory import CudaMemory

        servers.append(MailboxExpertServer(behave, CudaMemory(), options))
    print(*(server.address for server in servers), flush=True)
    sys.stdin.read()
