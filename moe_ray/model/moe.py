"""Routing: which experts a token goes to, the calls that carry its row to them, and the sum of what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from moe_ray.core import AdapterRows
from moe_ray.model.compute.torch.staging import CudaTransfers, Staging, view_of
from moe_ray.model.families import Router

LEAST_SUM: Final = 1e-20
"""Beside the sum that weights are divided by: no sigmoid may be above 0 (DeepseekV3TopkRouter of transformers)."""


class Routed:
    """Token rows in the order of their experts, and where each token's rows are."""

    __slots__ = (
        *("_adapters", "_counts", "_held", "_is_copy", "_on_host"),
        *("row_of", "rows", "staging", "token_adapters", "weights"),
    )

    def __init__(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        counts: list[int] | torch.Tensor,
        row_of: torch.Tensor,
        token_adapters: np.ndarray | None = None,
    ) -> None:
        """`counts`, rows of each expert [E], may still be on its way on the device."""
        self.rows = rows  # [T * K, D] expert by expert, tokens ascending within one
        self.weights = weights  # [T * K] float32 routing weight of each row
        self.row_of = row_of  # [T, K] where each token's k-th row is, experts ascending
        self.token_adapters = token_adapters
        """uint64 [T] the adapter that is added to the layer's experts for each token, ascending; None: for no token."""
        self.staging: Staging | None = None
        """What copies between the device and the host's memory; None: the rows are in the host's memory."""
        self._counts = counts
        self._adapters: list[tuple[AdapterRows, ...]] | None = None
        self._on_host: Routed | None = None
        self._is_copy = False
        self._held: list[torch.Tensor] = []
        """Of a copy in the host's memory: the buffers that it lies in."""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, weights, counts and where each token's rows are: the arguments of another one."""
        return self.rows, self.weights, torch.as_tensor(self._counts), self.row_of

    @property
    def counts(self) -> list[int]:
        """Rows of each expert, [E]. On a card the first read waits for all that was queued there: see `on_host`."""
        if isinstance(self._counts, torch.Tensor):
            self._counts = self._counts.tolist() if self._on_host is None else self._on_host.counts
        return self._counts

    @property
    def adapters(self) -> list[tuple[AdapterRows, ...]]:
        """Of each expert [E] which adapter is added for which of its rows, as `ExpertCall.adapters`."""
        if self._adapters is None:
            if self.token_adapters is None:
                self._adapters = [()] * len(self.counts)
            else:
                self._adapters = adapter_runs(self.token_adapters, self.on_host().row_of.numpy(), self.counts)
        return self._adapters

    def on_host(self) -> Routed:
        """The same in host memory, for experts elsewhere: everything is copied at once and waited for once.

        On a CPU it is this very object. It lasts until `brought`.
        """
        if self._is_copy or (self.staging is None and self.rows.device.type == "cpu"):
            return self
        if self._on_host is None:
            self.staging = self.staging or Staging(CudaTransfers(self.rows.device))
            buffer, (rows, weights, row_of, counts) = self.staging.fetch(
                (self.rows, self.weights, self.row_of, torch.as_tensor(self._counts))
            )
            self._on_host = Routed(rows, weights, counts.tolist(), row_of, self.token_adapters)
            self._on_host.staging, self._on_host._is_copy = self.staging, True
            self._on_host._held.append(buffer)
        return self._on_host

    def reply_rows(self) -> torch.Tensor | None:
        """Memory [T * K, D] to receive the experts' rows in, from which a device copies beside computing.

        Once a layer, of what `on_host` returned; None: any memory will do.
        """
        if not self._is_copy or self.staging is None:
            return None
        buffer = self.staging.take(self.rows.nbytes)
        self._held.append(buffer)
        return view_of(buffer, 0, self.rows.shape, self.rows.dtype)

    def brought(self, rows: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """What was gathered, rows [T * K, D], on this one's device; `into`: in this memory. Ends the use of `on_host`.

        A device copies it beside computing, and what the layer had in pinned memory is used again after that.
        """
        copy, self._on_host = self._on_host, None
        if copy is None or self.staging is None:
            here = rows.to(self.rows.device, non_blocking=True)
            return here if into is None else into.copy_(here, non_blocking=True)
        if into is None:
            into = torch.empty(rows.shape, dtype=rows.dtype, device=self.rows.device)
        end = self.staging.copy(into, rows)
        while copy._held:
            self.staging.give(copy._held.pop(), after=end)
        return into


def adapter_runs(
    token_adapters: np.ndarray, row_of: np.ndarray, counts: Sequence[int]
) -> list[tuple[AdapterRows, ...]]:
    """The runs of rows with one adapter of each expert [E]; () where none of its rows has one.

    token_adapters [T]; row_of [T, K] and counts [E] as `Routed` has them.
    """
    of_row = np.empty(row_of.size, dtype=token_adapters.dtype)
    of_row[row_of] = token_adapters[:, None]
    begins = np.ones(len(of_row) + 1, dtype=bool)  # of a run, and the end of the last
    begins[1:-1] = of_row[1:] != of_row[:-1]
    begins[np.cumsum(counts)[:-1]] = True
    starts = np.flatnonzero(begins).tolist()
    ids = of_row[starts[:-1]].tolist()
    runs: list[tuple[AdapterRows, ...]] = []
    index = end = 0
    for count in counts:
        end += count
        first = index
        while starts[index] < end:
            index += 1
        of_expert = tuple([AdapterRows(ids[i], starts[i + 1] - starts[i]) for i in range(first, index)])
        runs.append(of_expert if any(ids[first:index]) else ())
    return runs


def cut_runs(runs: tuple[AdapterRows, ...], start: int, count: int) -> tuple[AdapterRows, ...]:
    """The runs of rows [start, start + count) of those that `runs` tells of; () where none of them has an adapter."""
    cut: list[AdapterRows] = []
    for run in runs:
        common = min(run.count, start + count) - max(start, 0)
        if common > 0:
            cut.append(AdapterRows(run.adapter_id, common))
        start -= run.count
    return tuple(cut) if any(run.adapter_id for run in cut) else ()


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """What the experts of one layer made of its routed rows."""

    rows: torch.Tensor  # [T * K, D] in the order of `Routed.rows`, each times its routing weight
    degraded: torch.Tensor | None = None
    """bool [T]: the tokens for which an expert was left out; None: for no token."""


class PendingCalls(Protocol):
    """The expert calls of one layer in flight."""

    def gather(self) -> Gathered:
        """Wait for every reply. Raises `ExpertUnavailable`."""
        ...

    def abandon(self) -> None:
        """Stop waiting for what was not gathered. Idempotent."""
        ...


class Experts(Protocol):
    """Where expert calls go. A trunk layer is given one and never knows where its experts live."""

    def submit(self, layer: int, routed: Routed) -> PendingCalls:
        """Send the rows of one layer to their experts, without waiting for results.

        An expert's rows may go to several of its replicas, in one call each, and a call may be sent again.
        Experts in other processes are sent `routed.on_host()`, so that a card is waited for once a layer.
        """
        ...


def route(hidden: torch.Tensor, gate: torch.Tensor, top_k: int, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's experts [T, K] (ascending) and their weights [T, K] float32.

    Softmax over all experts in float32, then the top k, as transformers computes it; renormalised, they sum to 1
    (Mixtral, arXiv:2401.04088 section 2.1). hidden [T, D], gate [E, D].
    """
    return choose(F.linear(hidden, gate), top_k, router)


def choose(
    logits: torch.Tensor, top_k: int, router: Router, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` for the router's logits [T, E]; `correction` [E] as `Router.correction` says."""
    if router.jitter is not None:
        weights, experts = sparse_mixer(logits, router.jitter)
    else:
        scores = logits.float().sigmoid() if router.sigmoid else logits.softmax(dim=-1, dtype=torch.float32)
        ranked = scores if correction is None else scores + correction
        experts = in_best_groups(ranked, router).topk(top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
    if router.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + LEAST_SUM)
    if router.scale != 1.0:
        weights = weights * router.scale
    # Ascending expert order makes `combine` add in expert order, as a loop over experts would.
    experts, order = experts.sort(dim=-1)
    return experts, weights.gather(-1, order)


def in_best_groups(ranked: torch.Tensor, router: Router) -> torch.Tensor:
    """Ranks of experts [T, E], -inf for those outside their token's best groups.

    DeepSeek-V2 (arXiv:2405.04434, section 2.2.2) and V3 (arXiv:2412.19437, section 2.1.2).
    """
    if router.groups == 1:
        return ranked
    by_group = ranked.view(len(ranked), router.groups, -1)
    best = by_group.topk(2 if router.group_scores == "best two" else 1, dim=-1).values.sum(-1)  # [T, groups]
    taken = best.topk(router.groups_chosen, dim=-1).indices
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, taken, False)
    return by_group.masked_fill(outside[..., None], -torch.inf).flatten(1)


def sparse_mixer(logits: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, 2] float32 and experts [T, 2] of router logits [T, E], the best first (Liu et al., arXiv:2409.12136).

    Each of the two is weighed by a softmax over the experts whose logits lie near its own: not further below than
    2 * jitter of the larger of the two magnitudes. The second is chosen, and weighed, as if the first were not there.
    """
    weights, experts, left = [], [], logits
    for _ in range(2):
        best, which = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        near = left.masked_fill(far, -torch.inf)
        weights.append(near.softmax(dim=-1, dtype=torch.float32).gather(-1, which))
        experts.append(which)
        left = left.scatter(-1, which, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


def group(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Routed:
    """Sort token rows by expert. hidden [T, D]; chosen [T, K] and weights [T, K] as `route` returns them.

    Rows that chose `num_experts`, which is none, come last, and count for no expert.
    """
    tokens, top_k = chosen.shape
    flat = chosen.reshape(-1)
    by_expert = flat.argsort(stable=True)  # [T * K] flat (token, k) pairs, expert-major, tokens ascending
    row_of = torch.empty_like(by_expert)
    row_of[by_expert] = torch.arange(tokens * top_k, device=by_expert.device)
    # Not bincount, which waits for the device to know the size of its result.
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=flat.device)
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    return Routed(hidden[by_expert // top_k], weights.reshape(-1)[by_expert], counts, row_of.view(tokens, top_k))


def experts_of(routed: Routed) -> np.ndarray:
    """Return the experts of each token, [T, K] ascending, as `route` chose them."""
    routed = routed.on_host()
    expert_of_row = np.repeat(np.arange(len(routed.counts)), routed.counts)
    return expert_of_row[routed.row_of.numpy()]


def combine(rows: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    """Return the sum of each token's weighted outputs [T, D], added in expert order.

    rows [T * K, D] as `PendingCalls.gather` returns them; row_of [T, K].
    """
    per_token = rows[row_of]  # [T, K, D]
    out = per_token[:, 0]
    for k in range(1, per_token.shape[1]):
        out = out + per_token[:, k]
    return out


def renormalise(rows: torch.Tensor, routed: Routed, lost: Sequence[slice]) -> Gathered:
    """Scale the rows of each token that lost an expert so that the weights of its other experts sum to 1 again.

    `rows` [T * K, D] with zeros in the row ranges `lost`. A token that lost all its experts gets zeros.
    """
    missing = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    for part in lost:
        missing[part] = True
    row_of = routed.row_of.long()
    weights = routed.weights[row_of]  # [T, K]
    without = missing[row_of]  # [T, K]
    left = (weights * ~without).sum(-1)  # [T]
    scale = torch.where(left > 0, weights.sum(-1) / left.clamp_min(1e-9), 1.0)
    scale_of_row = torch.ones(rows.shape[0], device=rows.device)
    scale_of_row[row_of.flatten()] = scale.repeat_interleave(row_of.shape[1])
    return Gathered((rows.float() * scale_of_row[:, None]).to(rows.dtype), without.any(-1))
