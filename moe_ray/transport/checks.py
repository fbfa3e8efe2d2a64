"""Whether a reply fits its call, and whether a carrier's name is one."""

from __future__ import annotations

import math

from moe_ray.core import ExpertCall, ExpertReply
from moe_ray.errors import ConfigError, WrongAnswer


def check_reply(call: ExpertCall, reply: ExpertReply) -> ExpertReply:
    """Return `reply` if it fits `call` in shape, dtype and finiteness; else raise `WrongAnswer`."""
    if reply.rows.shape != call.rows.shape or reply.rows.dtype != call.rows.dtype:
        raise WrongAnswer(
            f"reply to layer {call.layer} expert {call.expert} is {reply.rows.dtype} {list(reply.rows.shape)}, "
            f"expected {call.rows.dtype} {list(call.rows.shape)}"
        )
    # One reduction instead of isfinite().all(): a sum is NaN or infinite if any element is. Summing in
    # float32 cannot overflow for values a float16 or bfloat16 network can produce.
    if not math.isfinite(float(reply.rows.detach().sum(dtype=_sum_dtype(call)))):
        raise WrongAnswer(f"reply to layer {call.layer} expert {call.expert} is not finite (NaN or Inf)")
    return reply


def _sum_dtype(call: ExpertCall):  # type: ignore[no-untyped-def]
    import torch

    return torch.float64 if call.rows.dtype == torch.float32 else torch.float32


def check_carrier(name: str, allowed: tuple[str, ...]) -> str:
    """Return `name` if it is a known carrier; else raise `ConfigError` naming the allowed ones."""
    if name not in allowed:
        raise ConfigError(f"transport {name!r} is not one of {', '.join(allowed)}")
    return name
