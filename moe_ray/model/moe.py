"""Routing: which experts a token goes to, the calls that carry it there, and the sum that brings it home."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from moe_ray.core import ExpertCall


class PendingCalls(Protocol):
    """Calls under way to their experts."""

    def gather(self) -> list[torch.Tensor]:
        """Wait for every reply; rows [T_e, D] in the order of the calls. Raises `ExpertUnavailable`."""
        ...

    def abandon(self) -> None:
        """Forget what was not gathered. Idempotent."""
        ...


class Experts(Protocol):
    """Where expert calls go. A trunk layer is given one and never knows where its experts live."""

    def submit(self, calls: list[ExpertCall]) -> PendingCalls:
        """Put the calls of one layer (at most one per expert) on their way without waiting for results."""
        ...


@dataclass(slots=True)
class Dispatched:
    """What `combine` needs of a `dispatch`."""

    pending: PendingCalls
    row_of: torch.Tensor  # [T, K] row in the concatenated replies of each token's k-th expert, experts ascending


def route(hidden: torch.Tensor, gate: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's experts [T, K] (ascending) and their weights [T, K] float32.

    Softmax over all experts in float32, the top k renormalised to sum 1 (Mixtral, arXiv:2401.04088 section 2.1, as
    transformers computes it). hidden [T, D], gate [E, D].
    """
    probabilities = F.linear(hidden, gate).softmax(dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # Ascending expert order makes `combine` add in expert order, as a loop over experts would.
    experts, order = experts.sort(dim=-1)
    return experts, weights.gather(-1, order)


def dispatch(
    experts: Experts, layer: int, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> Dispatched:
    """Scatter token rows to their experts, at most one call per expert.

    hidden [T, D]; chosen [T, K] and weights [T, K] as `route` returns them.
    """
    tokens, top_k = chosen.shape
    flat = chosen.reshape(-1)
    by_expert = flat.argsort(stable=True)  # [T * K] flat (token, k) pairs, expert-major, tokens ascending
    counts = flat.bincount(minlength=num_experts).tolist()
    rows = hidden[by_expert // top_k]
    row_weights = weights.reshape(-1)[by_expert]
    calls, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            calls.append(ExpertCall(layer, expert, rows[start:end], row_weights[start:end]))
            start = end
    row_of = torch.empty_like(by_expert)
    row_of[by_expert] = torch.arange(tokens * top_k, device=by_expert.device)
    return Dispatched(experts.submit(calls), row_of.view(tokens, top_k))


def combine(dispatched: Dispatched) -> torch.Tensor:
    """Wait for the experts and return the sum of each token's weighted outputs [T, D], added in expert order."""
    replies = dispatched.pending.gather()
    rows = replies[0] if len(replies) == 1 else torch.cat(replies)
    per_token = rows[dispatched.row_of]  # [T, K, D]
    out = per_token[:, 0]
    for k in range(1, per_token.shape[1]):
        out = out + per_token[:, k]
    return out
