"""What a person should do with a fleet, in plain sentences: a rule each, over placements that were timed. Pure data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.rates import COMPUTE_SHARE, READ_SHARE
from moe_ray.experts.planning.search import PlanFor, Proposed
from moe_ray.experts.planning.step_time import StepTime

MUCH_NETWORK: Final = 0.2
"""Share of a step from which on the network is named."""
HOT: Final = 1.5
"""Times the mean load from which on an expert is named."""
IDLE: Final = 0.5
"""Share of a step that experts compute, below which the trunk is named."""
MAX_NUM_SEQS: Final = 64
"""`engine.max_num_seqs`, unless it is set."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules look at."""

    found: Sequence[Proposed]
    """As `search` returns them, the best first."""
    machines: Machines
    asked: PlanFor

    @property
    def best(self) -> Proposed:
        return self.found[0]


def advise(situation: Situation) -> list[str]:
    """The sentences of all rules that have one, in their order."""
    return [sentence for rule in RULES if (sentence := rule(situation)) is not None]


def devices_said(machines: Machines, devices: Sequence[int]) -> str:
    """Devices as a person counts them: 8 x T4-16GB and 1 x L4-24GB."""
    counts = Counter(machines.devices[device].name for device in devices)
    return " and ".join(f"{count} x {name}" for name, count in counts.items())


def whole_or_apart(situation: Situation) -> str | None:
    """Whether to pull the model apart at all."""
    best, machines = situation.best, situation.machines
    where = machines.devices[best.spread.trunks[0]].name
    streams = max(best.steps)
    if best.spread.in_process:
        copies = len(best.spread.trunks)
        more = f"; {copies} of them can serve a copy each" if copies > 1 else ""
        return (
            f"Do not pull this model apart here: one {where} holds it in {best.form}, with "
            f"{best.kv_tokens // copies:,} KV tokens{more}."
        )
    single = next((each for each in situation.found if each.spread.in_process), None)
    if single is None:
        return (
            f"Pull this model apart: no single device here holds it with {streams} sequences of "
            f"{situation.asked.context:,} tokens; {devices_said(machines, best.spread.used)} do, in {best.form}."
        )
    name = machines.devices[single.spread.trunks[0]].name
    ratio = best.figure(situation.asked) / single.figure(situation.asked) if situation.asked.objective != "cost" else 0
    faster = f", {ratio:.1f} times as fast as that" if ratio else ", for less than that"
    return (
        f"One {name} holds this model in {single.form}; pulled apart in {best.form} over "
        f"{devices_said(machines, best.spread.used)} it is served{faster}."
    )


def network(situation: Situation) -> str | None:
    """What of a step is the network's, and what helps."""
    best, net = situation.best, situation.machines.network
    streams = min(best.steps)
    step = best.steps[streams]
    if step.network_share < MUCH_NETWORK:
        return None
    waits = best.cost.mixture_layers * step.micro_batches * 2 * net.latency_ms / 1e3
    by_latency = waits >= step.network_s / 2
    what = "latency" if by_latency else "bandwidth"
    helps = (
        "more sequences at once share it, a nearer network or fewer hosts shorten it"
        if by_latency
        else "a faster link, or experts on the trunk's own host, shorten it"
    )
    return f"The network's {what} is {step.network_share:.0%} of a step at {_said(streams)}: {helps}."


def bottleneck(situation: Situation) -> str | None:
    """Whether the trunk or the experts hold the others up."""
    best = situation.best
    if best.spread.in_process or len(best.spread.used) == 1:
        return None
    streams = max(best.steps)
    step = best.steps[streams]
    if step.trunk_s > step.experts_s and step.expert_busy < IDLE:
        return (
            f"The trunk is the bottleneck at {_said(streams)}: the experts' devices wait {1 - step.expert_busy:.0%} of "
            f"the time. More trunk replicas (trunk.num_replicas) use them better than more experts."
        )
    if step.experts_s > max(step.trunk_s, step.carrier_s, step.network_s):
        share = step.experts_s / (step.trunk_s + step.experts_s + step.carrier_s + step.network_s)
        return f"The experts are {share:.0%} of a step at {_said(streams)}: their memory's bandwidth is what counts."
    return None


def calls(situation: Situation) -> str | None:
    """Where what carries calls takes longest, as with many small experts, or on fast cards."""
    best = situation.best
    streams = max(best.steps)
    step = best.steps[streams]
    if step.carrier_s <= max(step.trunk_s, step.experts_s, step.network_s):
        return None
    share = step.carrier_s / (step.trunk_s + step.experts_s + step.carrier_s + step.network_s)
    return (
        f"Carrying calls to the experts is {share:.0%} of a step at {_said(streams)}, more than computing them: larger "
        f"batches, or experts in the trunk's own process, make less of it."
    )


def hot_experts(situation: Situation) -> str | None:
    """The expert that has most of a recorded load."""
    shares, best = situation.asked.shares, situation.best
    if shares is None or best.spread.in_process:
        return None
    mean = sum(shares) / len(shares)
    loads = [share / len(homes) / mean for share, homes in zip(shares, best.spread.homes, strict=True)]
    expert = max(range(len(loads)), key=loads.__getitem__)
    if loads[expert] < HOT:
        return None
    return (
        f"Expert {expert} has {loads[expert]:.1f}x the mean load: add a replica "
        f"(experts.overrides: {{{expert}: {{num_replicas: {len(best.spread.homes[expert]) + 1}}}}})."
    )


def dtype(situation: Situation) -> str | None:
    """Cards that have no bfloat16."""
    used = {situation.machines.devices[device].name for device in situation.best.spread.used}
    without = sorted(
        {each.name for each in situation.machines.devices if not each.has_bfloat16 and each.name in used},
    )
    if not without:
        return None
    return f"{', '.join(without)} has no bfloat16: float16 is planned; start with --dtype float16."


def sequences(situation: Situation) -> str | None:
    """How many sequences there is room for, where the engine would not use it."""
    best = situation.best
    most, trunks = best.most_streams(situation.asked.context), len(best.spread.trunks)
    if most <= MAX_NUM_SEQS * trunks:
        return None
    return (
        f"The KV cache has room for {most:,} sequences of {situation.asked.context:,} tokens; a trunk computes "
        f"{MAX_NUM_SEQS} in a step unless engine.max_num_seqs is raised."
    )


def idle_devices(situation: Situation) -> str | None:
    """Devices that nothing is put on."""
    used = set(situation.best.spread.used)
    idle = [device for device in range(len(situation.machines.devices)) if device not in used]
    if not idle:
        return None
    streams = max(situation.best.steps)
    return f"{devices_said(situation.machines, idle)} would add nothing at {_said(streams)}, and can stay out."


def shared_cores(situation: Situation) -> str | None:
    """Processes that share the cores of one host."""
    for device, processes in situation.best.spread.actors_on:
        on = situation.machines.devices[device]
        if on.is_cpu and not situation.best.spread.in_process and processes > on.rates.lanes:
            return (
                f"{processes} processes share the {on.rates.lanes} cores of one {on.name}: their experts compute one "
                f"after the other, {on.rates.lanes} at a time."
            )
    return None


def assumed(situation: Situation) -> str | None:
    """What the figures rest on."""
    if all(situation.machines.devices[device].measured for device in situation.best.spread.used):
        return None
    return (
        f"These figures are computed from data sheets ({READ_SHARE:.0%} of the bandwidth, {COMPUTE_SHARE:.0%} of the "
        f"arithmetic), not measured."
    )


Rule = Callable[[Situation], str | None]
RULES: Final[tuple[Rule, ...]] = (
    whole_or_apart,
    network,
    bottleneck,
    calls,
    hot_experts,
    shared_cores,
    dtype,
    sequences,
    idle_devices,
    assumed,
)


def placement_said(machines: Machines, spread: Spread) -> str:
    """A placement in a few words."""
    if spread.in_process:
        return f"whole, {devices_said(machines, spread.trunks)}"
    trunk = devices_said(machines, spread.trunks)
    homes = sorted({device for homes in spread.homes for device in homes})
    more = f", {spread.copies} copies" if spread.copies else ""
    return f"trunk on {trunk}; experts on {devices_said(machines, homes)}{more}"


def parts_ms(step: StepTime) -> dict[str, float]:
    """The parts of a step in milliseconds, as if nothing overlapped."""
    return {
        "trunk_ms": 1e3 * step.trunk_s,
        "experts_ms": 1e3 * step.experts_s,
        "carrier_ms": 1e3 * step.carrier_s,
        "network_ms": 1e3 * step.network_s,
    }


def _said(streams: int) -> str:
    return f"{streams} sequence{'s' if streams != 1 else ''} at once"
