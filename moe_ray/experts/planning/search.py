"""Which placement of a model on machines is best: every format and way to place it, timed by `step_time`. Pure data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moe_ray.errors import ConfigError
from moe_ray.experts.planning.footprint import LEAST_CACHE_TOKENS
from moe_ray.experts.planning.machines import Machines, Spread, held_on, kv_tokens
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.spreads import apart, whole
from moe_ray.experts.planning.step_time import StepTime, decode_step, prefill_s

Objective = Literal["tokens", "latency", "cost"]
OBJECTIVES: Final = ("tokens", "latency", "cost")
MILLION: Final = 1_000_000
EQUAL: Final = 0.02
"""Placements whose figures differ by less are alike: the one on fewer devices is better."""


class DoesNotFit(ConfigError):
    """No device, and no number of them, holds the model in any of the formats; says what each needs."""


@dataclass(frozen=True, slots=True)
class PlanFor:
    """What the placement is for."""

    streams: tuple[int, ...] = (1, 8, 32)
    """Sequences at once. The last is what tokens/s and cost are judged by, the first what latency is."""
    context: int = 1024
    """Tokens of each."""
    prompt: int = 512
    """Tokens of the prompt whose first token is timed."""
    objective: Objective = "tokens"
    shares: tuple[float, ...] | None = None
    """How popular each expert is, where it was recorded."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """One placement in one format, and what it is predicted to do."""

    form: str
    """What the matrices are held as."""
    cost: ModelCost
    spread: Spread
    kv_tokens: int
    """Of all trunks together."""
    steps: Mapping[int, StepTime]
    """By sequences at once; those are left out for which the KV cache has no room."""
    first_token_s: float
    price_per_hour: float | None

    def most_streams(self, context: int) -> int:
        """Sequences of so many tokens for which the KV cache has room."""
        return self.kv_tokens // context

    def price_per_million(self, streams: int) -> float | None:
        """Of a million tokens at so many sequences at once; None where no price is given."""
        step = self.steps.get(streams)
        if self.price_per_hour is None or step is None or not step.tokens_per_s:
            return None
        return self.price_per_hour / (3600 * step.tokens_per_s) * MILLION

    def figure(self, asked: PlanFor) -> float:
        """What is compared: more is better. -inf where the KV cache has no room for what is asked."""
        streams = asked.streams[0] if asked.objective == "latency" else asked.streams[-1]
        step = self.steps.get(streams)
        if step is None:
            return -math.inf
        if asked.objective == "latency":
            return 1 / step.seconds
        price = self.price_per_million(streams)
        return -price if asked.objective == "cost" and price is not None else step.tokens_per_s


def search(
    costs: Mapping[str, ModelCost], machines: Machines, asked: PlanFor, per_actor: Sequence[int]
) -> list[Proposed]:
    """The best placement of each format, whole and apart, the best first. `costs`: the model in each format.

    Raises `DoesNotFit`, or `ConfigError` where no price is given and cost is asked for.
    """
    if asked.objective == "cost" and any(device.price_per_hour is None for device in machines.devices):
        raise ConfigError('--objective cost: every machine needs a price: --fleet "8x T4@0.35", or price_per_hour')
    found: list[Proposed] = []
    for form, cost in costs.items():
        cache = min(LEAST_CACHE_TOKENS, asked.context) * cost.kv_bytes_per_token
        for spreads in (
            whole(cost, machines, cache),
            apart(cost, machines, cache, per_actor, asked.shares),
        ):
            timed = [candidate(form, cost, machines, spread, asked) for spread in spreads]
            timed = [each for each in timed if each.figure(asked) > -math.inf]
            if timed:
                found.append(best(timed, asked))
    if not found:
        raise DoesNotFit(_nothing_fits(costs, machines, asked))
    return ordered(found, asked)


def ordered(found: Sequence[Proposed], asked: PlanFor) -> list[Proposed]:
    """The best first; of equal ones that on fewer devices."""
    return sorted(found, key=lambda each: (-each.figure(asked), len(each.spread.used)))


def best(found: Sequence[Proposed], asked: PlanFor) -> Proposed:
    """The one with the best figure; of those within `EQUAL` of it, the one on the fewest devices."""
    top = max(each.figure(asked) for each in found)
    near = [each for each in found if each.figure(asked) >= top - EQUAL * abs(top)]
    return min(near, key=lambda each: (len(each.spread.used), each.spread.copies, -each.figure(asked)))


def candidate(form: str, cost: ModelCost, machines: Machines, spread: Spread, asked: PlanFor) -> Proposed:
    """Time one placement."""
    held = held_on(spread, cost.trunk_bytes, cost.expert_bytes)
    tokens = kv_tokens(machines, spread, held, cost.kv_bytes_per_token)
    steps = {
        streams: decode_step(cost, machines, spread, streams, asked.context, asked.shares)
        for streams in asked.streams
        if streams * asked.context <= tokens
    }
    prices = [machines.devices[device].price_per_hour for device in spread.used]
    known = [price for price in prices if price is not None]
    first = prefill_s(cost, machines, spread, asked.prompt, shares=asked.shares)
    price = sum(known) if len(known) == len(prices) else None
    return Proposed(form, cost, spread, tokens, steps, first, price)


def _nothing_fits(costs: Mapping[str, ModelCost], machines: Machines, asked: PlanFor) -> str:
    needs = ", ".join(
        f"{form} needs {(cost.trunk_bytes + cost.num_experts * cost.expert_bytes) / 1e9:.1f} GB of weights and "
        f"{asked.streams[-1] * asked.context * cost.kv_bytes_per_token / 1e9:.1f} GB of KV cache"
        for form, cost in costs.items()
    )
    there = sum(device.usable_bytes for device in machines.devices) / 1e9
    return (
        f"this fleet does not hold the model with {asked.streams[-1]} sequences of {asked.context} tokens: {needs}; "
        f"{len(machines.devices)} devices have {there:.1f} GB to give"
    )
