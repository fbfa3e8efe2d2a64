"""What a network between a trunk and its experts adds to a step: bytes and milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_ray.model.formats import dtype_bytes
from moe_ray.model.model_config import ModelConfig

WEIGHT_BYTES = 4
"""Of a routing weight, which goes out with its row."""
CALL_BYTES = 96
"""Of a call or reply beside its rows: TCP, IP and Ethernet's headers, and ours."""


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

    Each of L layers (with experts) scatters and gathers once over the trunk's link of B bytes/s, one-way latency l:

        step = L * (2 * l + (out + in) / B)
        out  = r * T * K * (D * b + 4) + calls * H
        in   = r * T * K * D * b       + calls * H
        calls = r * E * (1 - (1 - K / E) ** T)

    with T tokens, K experts a token of E, rows of D elements of b bytes and a weight of 4, H bytes of headers a call,
    and r the share of experts on other hosts than the trunk. `calls` is what uniform routing makes of T tokens.
    Micro-batches hide some of it behind computing, and a full-duplex link lets replies pass requests: neither is
    assumed. Carriers that compute headers, or need more than one round trip for a call, take longer.
    """
    layers, experts, chosen = len(model.mixture_layers), model.num_local_experts, model.num_experts_per_tok
    row = model.hidden_size * dtype_bytes(dtype)
    rows = remote * tokens * chosen
    headers = CALL_BYTES * remote * experts * (1 - (1 - chosen / experts) ** tokens)
    out, back = layers * (rows * (row + WEIGHT_BYTES) + headers), layers * (rows * row + headers)
    transfer_s = 0.0 if network.gbit is None else 8 * (out + back) / (1e9 * network.gbit)
    return NetworkStep(tokens, round(out), round(back), layers * 2 * network.latency_ms, 1e3 * transfer_s)
