"""What a model needs, before anything is started: bytes per actor, KV cache, what fits, what a network adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_ray.experts.planning.placement import Holding, holdings
from moe_ray.model.formats import FLOATS, dtype_bytes
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_expert, weights_of_trunk

WEIGHT_BYTES = 4
"""Of a routing weight, which goes out with its row."""
CALL_BYTES = 96
"""Of a call or reply beside its rows: TCP, IP and Ethernet's headers, and ours."""


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """One actor: what it holds."""

    name: str
    parameters: int
    weight_bytes: int
    spare: bool = False
    """It holds copies of what others hold."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole model, pulled apart."""

    dtype: str
    actors: tuple[ActorPlan, ...]
    """The trunk first, then the experts in order, then spares."""
    kv_bytes_per_token: int
    context: int
    """Tokens of one sequence at the model's full context length."""

    @property
    def total_parameters(self) -> int:
        """The model's; spares hold copies."""
        return sum(actor.parameters for actor in self.actors if not actor.spare)

    @property
    def total_bytes(self) -> int:
        """The model's; spares hold copies."""
        return sum(actor.weight_bytes for actor in self.actors if not actor.spare)

    def fits(self, card_bytes: int, reserve: float = 0.1) -> list[tuple[ActorPlan, bool, int]]:
        """(actor, whether its weights fit a card of `card_bytes`, KV tokens that remain for it) for each actor.

        `reserve` is the share of the card kept for activations and the runtime. Experts hold no KV cache.
        """
        usable = int(card_bytes * (1 - reserve))
        rows = []
        for actor in self.actors:
            left = usable - actor.weight_bytes
            tokens = max(0, left) // self.kv_bytes_per_token if actor is self.actors[0] else 0
            rows.append((actor, left >= 0 and (actor is not self.actors[0] or tokens > 0), tokens))
        return rows


@dataclass(frozen=True, slots=True)
class Network:
    """What lies between the trunk and its experts."""

    latency_ms: float = 0.0
    """One way."""
    gbit: float | None = None
    """Bandwidth of the trunk's link, in each direction; None: it takes no time."""


@dataclass(frozen=True, slots=True)
class NetworkStep:
    """What the network adds to a step of `tokens` tokens, one of each stream while they decode."""

    tokens: int
    bytes_out: int
    """Over the trunk's link, all layers together."""
    bytes_in: int
    latency_ms: float
    transfer_ms: float

    @property
    def network_ms(self) -> float:
        return self.latency_ms + self.transfer_ms

    def step_ms(self, compute_ms: float = 0.0) -> float:
        """The whole step, if computing takes `compute_ms` of it and nothing overlaps."""
        return compute_ms + self.network_ms

    def tokens_per_s(self, compute_ms: float = 0.0) -> float:
        """Tokens/s of all streams together; without computing: a bound that no machine passes. inf: no bound."""
        step_ms = self.step_ms(compute_ms)
        return 1e3 * self.tokens / step_ms if step_ms else math.inf


def network_step(model: ModelConfig, dtype: str, network: Network, tokens: int, remote: float = 1.0) -> NetworkStep:
    """What `network` adds to a step that computes `tokens` tokens, if no two waits overlap.

    Each of L layers scatters once and gathers once over the trunk's link of B bytes/s and one-way latency l:

        step = L * (2 * l + (out + in) / B)
        out  = r * T * K * (D * b + 4) + calls * H
        in   = r * T * K * D * b       + calls * H
        calls = r * E * (1 - (1 - K / E) ** T)

    with T tokens, K experts a token of E, rows of D elements of b bytes and a weight of 4, H bytes of headers a call,
    and r the share of experts on other hosts than the trunk. `calls` is what uniform routing makes of T tokens.
    Micro-batches hide some of it behind computing, and a full-duplex link lets replies pass requests: neither is
    assumed. Carriers that compute headers, or need more than one round trip for a call, take longer.
    """
    layers, experts, chosen = model.num_hidden_layers, model.num_local_experts, model.num_experts_per_tok
    row = model.hidden_size * dtype_bytes(dtype)
    rows = remote * tokens * chosen
    headers = CALL_BYTES * remote * experts * (1 - (1 - chosen / experts) ** tokens)
    out, back = layers * (rows * (row + WEIGHT_BYTES) + headers), layers * (rows * row + headers)
    transfer_s = 0.0 if network.gbit is None else 8 * (out + back) / (1e9 * network.gbit)
    return NetworkStep(tokens, round(out), round(back), layers * 2 * network.latency_ms, 1e3 * transfer_s)


def make_plan(model: ModelConfig, dtype: str, placed: Sequence[Holding] | None = None) -> Plan:
    """Plan `model` in `dtype`: one trunk, and the actors of `placed`; default: one per expert over all layers."""
    held_as = FLOATS[dtype]
    trunk = list(weights_of_trunk(model))
    key = key_parameters(model)
    key_bytes = sum(held_as.nbytes(weight.shape) for weight in weights_of_expert(model, 0, 0))
    if placed is None:
        placed = holdings(model.num_hidden_layers, model.num_local_experts)
    trunk_bytes = sum(held_as.nbytes(weight.shape) for weight in trunk)
    actors = [ActorPlan("Trunk", sum(weight.numel for weight in trunk), trunk_bytes)]
    for held in placed:
        count = len(held.keys)
        actors.append(ActorPlan(held.name, key * count, key_bytes * count, held.spare is not None))
    return Plan(dtype, tuple(actors), model.kv_elements_per_token * dtype_bytes(dtype), model.max_position_embeddings)


def key_parameters(model: ModelConfig) -> int:
    """Parameters of one expert in one layer."""
    return sum(weight.numel for weight in weights_of_expert(model, 0, 0))
