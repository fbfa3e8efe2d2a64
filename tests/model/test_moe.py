"""Routing, dispatch and combine against a plain loop over the experts, bit for bit."""

from __future__ import annotations

import pytest
import torch

from moe_ray.core import ExpertCall
from moe_ray.model.families import Router
from moe_ray.model.moe import Gathered, Routed, combine, group, route


def calls_of(layer: int, routed: Routed) -> list[ExpertCall]:
    """One call for each expert that has rows, experts ascending."""
    calls, start = [], 0
    for expert, count in enumerate(routed.counts):
        if count:
            end = start + count
            calls.append(ExpertCall(layer, expert, routed.rows[start:end], routed.weights[start:end]))
            start = end
    return calls


class Doubling:
    """Expert e returns rows * (e + 1) * weight; remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[ExpertCall] = []

    def submit(self, layer: int, routed: Routed) -> Doubling:
        self.calls = calls_of(layer, routed)
        return self

    def gather(self) -> Gathered:
        return Gathered(torch.cat([expert(call.expert, call.rows, call.weights) for call in self.calls]))

    def abandon(self) -> None:
        """Nothing is in flight."""


def expert(index: int, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((rows * (index + 1)) * weights.unsqueeze(-1)).to(rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 5), (4, 4), (16, 1)])
def test_the_sum_is_that_of_a_loop_over_the_experts(dtype: torch.dtype, num_experts: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    hidden = torch.randn(37, 24, generator=generator).to(dtype)
    gate = torch.randn(num_experts, 24, generator=generator).to(dtype)
    chosen, weights = route(hidden, gate, top_k, Router(renormalise=True))
    assert torch.equal(chosen, chosen.sort(-1).values)
    probabilities = (hidden @ gate.T).float().softmax(-1)
    best = probabilities.topk(top_k, -1)
    assert torch.equal(chosen, best.indices.sort(-1).values)
    torch.testing.assert_close(weights.sum(-1), torch.ones(37))
    dense = torch.zeros(37, num_experts).scatter_(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(weights, dense.gather(1, chosen))

    as_they_are = route(hidden, gate, top_k, Router(renormalise=False))
    assert torch.equal(as_they_are[0], chosen)
    torch.testing.assert_close(as_they_are[1], probabilities.gather(1, chosen))

    experts = Doubling()
    routed = group(hidden, chosen, weights, num_experts)
    out = combine(experts.submit(3, routed).gather().rows, routed.row_of)
    looped = torch.zeros_like(hidden)
    for index in range(num_experts):  # ascending: addition of rounded numbers is not associative
        tokens, place = (chosen == index).nonzero(as_tuple=True)
        looped[tokens] += expert(index, hidden[tokens], weights[tokens, place])
    assert torch.equal(out, looped)
    called = [call.expert for call in experts.calls]
    assert called == sorted(set(called)), "one call for each expert that has rows, in order"
    assert {call.layer for call in experts.calls} == {3}
    assert sum(len(call.rows) for call in experts.calls) == 37 * top_k
