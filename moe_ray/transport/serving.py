"""What every carrier's server does with a call: run the handler, and let only declared errors out."""

from __future__ import annotations

from typing import Final

from moe_ray.core import ExpertCall, ExpertReply
from moe_ray.errors import CallCancelled, CallRefused, ExpertFailed, InvalidCall, ProtocolError, ReplicaBusy
from moe_ray.transport import wire
from moe_ray.transport.base import ExpertHandler

ANSWERED_ERRORS: Final = (ExpertFailed, CallRefused, ReplicaBusy, InvalidCall, ProtocolError)
"""What is answered with a status and a message; the connection and the calls behind outlive it."""


def answer(handler: ExpertHandler, call: ExpertCall) -> ExpertReply:
    """Compute `call` on this thread. Raises `ExpertFailed`, `CallRefused`, `ReplicaBusy` or `CallCancelled`.

    An unforeseen exception of the handler becomes `ExpertFailed` with its type and message: it belongs to this call,
    and the connection and the calls behind it must outlive it.
    """
    try:
        reply = handler(call)
    except (ExpertFailed, CallRefused, ReplicaBusy, CallCancelled):
        raise
    except Exception as error:
        raise ExpertFailed(f"{type(error).__name__}: {error}") from error
    if reply.call_id != call.call_id:
        raise ExpertFailed(f"the handler answered call {call.call_id} with the reply to call {reply.call_id}")
    try:
        wire.check_rows(reply.rows, "reply.rows")
    except InvalidCall as error:
        raise ExpertFailed(str(error)) from error
    return reply
