"""Whether a reply fits its call, and whether a carrier's name is one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_ray.core import ExpertCall, ExpertReply
from moe_ray.errors import ConfigError, WrongAnswer

if TYPE_CHECKING:
    import torch


def check_reply(call: ExpertCall, reply: ExpertReply, total: float | None = None) -> ExpertReply:
    """Return `reply` if it fits `call` in shape, dtype and finiteness; else raise `WrongAnswer`.

    `total`: the sum of its rows, where it is known already.
    """
    if reply.rows.shape != call.rows.shape or reply.rows.dtype != call.rows.dtype:
        raise WrongAnswer(
            f"reply to layer {call.layer} expert {call.expert} is {reply.rows.dtype} {list(reply.rows.shape)}, "
            f"expected {call.rows.dtype} {list(call.rows.shape)}"
        )
    # One reduction instead of isfinite().all(): a sum is NaN or infinite if any element is. Summing in
    # float32 cannot overflow for values a float16 or bfloat16 network can produce.
    if not math.isfinite(float(sum_of(reply.rows)) if total is None else total):
        raise WrongAnswer(f"reply to layer {call.layer} expert {call.expert} is not finite (NaN or Inf)")
    return reply


def sum_of(rows: torch.Tensor) -> torch.Tensor:
    """The sum of rows, a scalar where they are: finite if and only if all of them are."""
    import torch

    return rows.detach().sum(dtype=torch.float64 if rows.dtype == torch.float32 else torch.float32)


def check_carrier(name: str, allowed: tuple[str, ...]) -> str:
    """Return `name` if it is a known carrier; else raise `ConfigError` naming the allowed ones."""
    if name not in allowed:
        raise ConfigError(f"transport {name!r} is not one of {', '.join(allowed)}")
    return name
