"""Routing, dispatch and combine against a plain loop over the experts, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moe_ray.core import AdapterRows, ExpertCall
from moe_ray.model.expert import joined_runs
from moe_ray.model.families import Router
from moe_ray.model.moe import Gathered, Routed, combine, cut_runs, group, route


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


@pytest.mark.parametrize("seed", range(20))
def test_an_experts_runs_are_those_of_its_tokens(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens, num_experts = int(generator.integers(1, 30)), int(generator.integers(2, 9))
    of_token = np.sort(generator.choice(np.array([0, 3, 2**63 - 1], dtype=np.uint64), tokens))
    hidden = torch.randn(tokens, 8)
    chosen, weights = route(hidden, torch.randn(num_experts, 8), 2, Router(renormalise=True))
    routed = group(hidden, chosen, weights, num_experts)
    assert routed.adapters == [()] * num_experts
    routed.token_adapters = of_token
    routed = Routed(routed.rows, routed.weights, routed.counts, routed.row_of, of_token)
    for expert, runs in enumerate(routed.adapters):
        ids = [int(each) for each, of in zip(of_token, chosen.tolist(), strict=True) if expert in of]
        flat = [run.adapter_id for run in runs for _ in range(run.count)]
        assert flat == (ids if any(ids) else [])
        assert all(a.adapter_id < b.adapter_id for a, b in itertools.pairwise(runs)), "as few as can be"
        for start in range(len(ids)):
            for count in range(1, len(ids) - start + 1):
                cut = cut_runs(runs, start, count)
                part = ids[start : start + count]
                assert [run.adapter_id for run in cut for _ in range(run.count)] == (part if any(part) else [])


def test_the_runs_of_calls_are_joined() -> None:
    first, second = (AdapterRows(1, 2), AdapterRows(5, 1)), (AdapterRows(5, 4),)
    assert joined_runs([((), 3), ((), 2)]) == ()
    assert joined_runs([(first, 3), ((), 2), (second, 4)]) == (*first, AdapterRows(0, 2), *second)
