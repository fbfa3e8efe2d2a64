"""How long a step takes on a placement, in parts: trunk, experts, carrier, network. Pure functions of plain data.

A layer of one micro-batch takes t = trunk + carrier + network + experts, one after the other. With m micro-batches in
n trunks, each device is busy with all of them, so that a layer takes

    max(t, m * trunk's busy time, n * m * the busiest expert device's)

(ping-pong: MegaScale-Infer, arXiv:2504.02263, section 4.1). Devices that share cores, or are one, do not overlap. A
carrier's calls and rows keep the trunk busy, its round trip does not; rows are written while those of earlier calls are
being sent. A layer without experts takes what the trunk does, m times. Parts are told as they are before anything
overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moe_ray.experts.planning.expert_calls import called
from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.network_step import CALL_BYTES, WEIGHT_BYTES
from moe_ray.experts.planning.routing import rows_of_layers

MICRO_BATCHES: Final = (1, 2, 3)
"""`engine.micro_batches: auto` tries these."""
WORTH: Final = 0.97
"""...and takes another number than 1 only if its step takes less than this share (`engine.overlap.MARGIN`)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of every trunk, and what of it is whose."""

    tokens: int
    """Of all trunks together."""
    seconds: float
    trunk_s: float
    """Of the whole step: attention, router, head, and what its software takes."""
    experts_s: float
    """Waiting for the busiest expert device of each layer."""
    carrier_s: float
    network_s: float
    micro_batches: int
    expert_busy: float
    """Share of the step that the mean expert device computes."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def network_share(self) -> float:
        """Of the parts before anything overlaps."""
        whole = self.trunk_s + self.experts_s + self.carrier_s + self.network_s
        return self.network_s / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class _Layer:
    """Mean seconds of one layer (with experts) of one micro-batch of one trunk."""

    trunk: float
    dense: float
    """Of the trunk, for one without experts."""
    experts: float
    carrier: float
    network: float
    busiest: float
    """Of the busiest expert device: the largest of the devices' means, for what many micro-batches bring evens out."""
    mean_busy: float
    beside_trunk: float
    """What expert devices on the trunk's own device compute."""
    waiting: float
    """Of the carrier's time: a round trip, in which the trunk has nothing to do for this micro-batch."""
    hidden: float
    """Of the carrier's time: it passes while earlier rows are on their way through the network."""


def decode_step(
    cost: ModelCost,
    machines: Machines,
    spread: Spread,
    sequences: int,
    context: float,
    shares: Sequence[float] | None = None,
    micro_batches: int | None = None,
) -> StepTime:
    """A step that makes one token of each of `sequences`, which hold `context` tokens each; spread over the trunks.

    `shares`: how popular each expert is, default all alike. `micro_batches`: that many, default whichever is fastest.
    """
    mine = max(1, round(sequences / len(spread.trunks)))
    trunks = min(len(spread.trunks), sequences)
    choices = (micro_batches,) if micro_batches else (1,) if spread.in_process else MICRO_BATCHES
    steps = [_step(cost, machines, spread, (mine, context, mine), m, trunks, shares) for m in choices if m <= mine] or [
        _step(cost, machines, spread, (mine, context, mine), 1, trunks, shares)
    ]
    fastest = min(steps, key=lambda step: step.seconds)
    return fastest if fastest.seconds < WORTH * steps[0].seconds else steps[0]


def prefill_s(
    cost: ModelCost,
    machines: Machines,
    spread: Spread,
    prompt: int,
    chunk: int = 512,
    shares: Sequence[float] | None = None,
) -> float:
    """Seconds until the first token of one prompt on an idle server, computed in chunks of `chunk` tokens."""
    total, done = 0.0, 0
    while done < prompt:
        tokens = min(chunk, prompt - done)
        logits = 1 if done + tokens == prompt else 0
        total += _step(cost, machines, spread, (tokens, done + tokens / 2, logits), 1, 1, shares).seconds
        done += tokens
    return total


def _step(
    cost: ModelCost,
    machines: Machines,
    spread: Spread,
    work: tuple[int, float, int],
    micro_batches: int,
    trunks: int,
    shares: Sequence[float] | None,
) -> StepTime:
    """`work`: tokens, context of each, and sequences that get logits, of one trunk."""
    tokens, context, logits = work
    part = max(1, round(tokens / micro_batches))
    layer = _layer(cost, machines, spread, part, context, shares)
    latency = layer.trunk + layer.carrier + layer.network + layer.experts - layer.hidden
    busy_trunk = micro_batches * (layer.trunk + layer.carrier - layer.waiting + trunks * layer.beside_trunk)
    cycle = max(latency, busy_trunk, trunks * micro_batches * layer.busiest)
    if spread.in_process:
        cycle = latency  # each trunk has its own experts, and nothing to wait for
    trunk = machines.devices[spread.trunks[0]].rates
    head = trunk.trunk_s(cost.head.form, cost.head.weights, cost.head.nbytes, logits) if logits else 0.0
    dense = cost.dense_layers * micro_batches * layer.dense
    own = head + trunk.step_overhead().seconds(0, logits) + dense
    seconds = cost.mixture_layers * cycle + own
    many = cost.mixture_layers * micro_batches
    return StepTime(
        tokens * trunks,
        seconds,
        many * layer.trunk + own,
        many * layer.experts,
        many * layer.carrier,
        many * layer.network,
        micro_batches,
        min(1.0, trunks * many * layer.mean_busy / seconds),
    )


def _layer(
    cost: ModelCost, machines: Machines, spread: Spread, tokens: int, context: float, shares: Sequence[float] | None
) -> _Layer:
    where = spread.trunks[0]
    trunk = machines.devices[where].rates
    a, r, d = cost.attention, cost.router, cost.dense
    seen = cost.seen(context)
    kv = tokens * seen * cost.kv_bytes_per_token / cost.layers
    attending = trunk.attention_s(tokens * seen, cost.query_width, cost.head_dim, kv)
    computing = trunk.trunk_s(a.form, a.weights, a.nbytes, tokens) + attending
    if r.weights:
        computing += trunk.trunk_s(r.form, r.weights, r.nbytes, tokens)
    drawn = rows_of_layers(cost.num_experts, cost.top_k, tokens, shares)
    local, spread_out = trunk.layer_overhead(False), trunk.layer_overhead(True)
    found = [called(cost, machines, spread, rows) for rows in drawn]
    n = len(found)
    busy = {device: sum(each.busy.get(device, 0.0) for each in found) / n for device in spread.used}
    calls, total_rows = sum(each.calls for each in found) / n, float(tokens * cost.top_k)
    overhead = local.seconds(0 if not spread.in_process else calls, total_rows)
    carrier = 0.0
    if not spread.in_process:
        carrier = max(0.0, spread_out.seconds(calls, total_rows) - overhead)
    network = sum(_network_s(cost, machines, each.remote_rows, each.remote_calls) for each in found) / n
    makespan, on_trunk = sum(each.makespan for each in found) / n, sum(each.on_trunk for each in found) / n
    once = max(0.0, spread_out.seconds(0, 0) - local.seconds(0, 0))
    writing = max(0.0, spread_out.seconds(0, total_rows) - spread_out.seconds(0, 0))
    dense = trunk.trunk_s(d.form, d.weights, d.nbytes, tokens) + attending + local.seconds(0, 0)
    return _Layer(
        computing + overhead,
        dense,
        makespan,
        carrier,
        network,
        max(busy.values()),
        sum(busy.values()) / max(1, sum(each > 0 for each in busy.values())),
        on_trunk,
        min(carrier, once),
        min(carrier, _hidden_s(cost, machines, writing, sum(each.remote_rows for each in found) / n, calls)),
    )


def _network_s(cost: ModelCost, machines: Machines, rows: float, calls: float) -> float:
    """A layer's scatter and gather over the trunk's link, with the bytes of `network_step.network_step`.

    The link carries both directions at once: replies of early calls come in while later calls go out, so that only the
    last call's reply is waited for. (`network_step` is a bound and adds up both.)
    """
    if not calls:
        return 0.0
    network = machines.network
    out = rows * (cost.row_bytes + WEIGHT_BYTES) + calls * CALL_BYTES
    back = (rows * cost.row_bytes + calls * CALL_BYTES) / calls
    return 2 * network.latency_ms / 1e3 + (0.0 if network.gbit is None else 8 * (out + back) / (1e9 * network.gbit))


def _hidden_s(cost: ModelCost, machines: Machines, writing: float, rows: float, calls: float) -> float:
    """What of the time of `writing` rows to sockets passes while the rows of earlier calls are being sent.

    The shorter of the two, of all calls but one.
    """
    gbit = machines.network.gbit
    if calls <= 1 or gbit is None:
        return 0.0
    sending = 8 * rows * (cost.row_bytes + WEIGHT_BYTES) / (1e9 * gbit)
    return min(writing, sending) * (1 - 1 / calls)
