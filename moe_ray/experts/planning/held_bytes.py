"""What of a placed model is on each device, and what of its experts is in the memory of hosts. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.experts.planning.machines import Machines, Spread
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.offload import ON_CARD, HostShare, host_share


def of_actor(cost: ModelCost, experts: Sequence[int]) -> HostShare:
    """What an actor with these experts has in its host's memory. Raises `ConfigError` as `offload.host_share`."""
    asked = cost.offload[experts[0]] if cost.offload else 0
    return host_share(cost.expert.nbytes, len(experts) * cost.mixture_layers, asked) if asked else ON_CARD


def in_one_process(cost: ModelCost) -> tuple[HostShare, ...]:
    """The same of each expert, where all are in one process: the buffers are counted with the first that needs them."""
    sharers = sum(1 for nbytes in cost.offload if nbytes)
    shares = list[HostShare]()
    for asked in cost.offload or (0,) * cost.num_experts:
        share = host_share(cost.expert.nbytes, cost.mixture_layers, asked, sharers) if asked else ON_CARD
        counted = any(each.buffer_bytes for each in shares)
        shares.append(HostShare(share.host_bytes, 0 if counted else share.buffer_bytes))
    return tuple(shares)


def card_bytes(cost: ModelCost, experts: Sequence[int]) -> int:
    """What an actor with these experts takes of its device, buffers included."""
    return of_actor(cost, experts).on_card(len(experts) * cost.expert_bytes)


def whole_card_bytes(cost: ModelCost) -> int:
    """What trunk and experts in one process take of their device."""
    return cost.trunk_bytes + sum(share.on_card(cost.expert_bytes) for share in in_one_process(cost))


def held_on(cost: ModelCost, spread: Spread) -> dict[int, int]:
    """Bytes of weights on each device."""
    held: dict[int, int] = {}
    for device in spread.trunks:
        more = whole_card_bytes(cost) if spread.in_process else cost.trunk_bytes
        held[device] = held.get(device, 0) + more
    for actor in () if spread.in_process else spread.actors():
        for device in spread.homes[actor[0]]:
            held[device] = held.get(device, 0) + card_bytes(cost, actor)
    return held


def host_bytes(cost: ModelCost, machines: Machines, spread: Spread) -> dict[int, int]:
    """Bytes of experts' weights in the memory of each host; {}: there is no offload."""
    found: dict[int, int] = {}
    if spread.in_process:
        each = sum(share.host_bytes for share in in_one_process(cost))
        placed = [(device, each) for device in spread.trunks]
    else:
        actors = spread.actors()
        placed = [(home, of_actor(cost, actor).host_bytes) for actor in actors for home in spread.homes[actor[0]]]
    for device, nbytes in placed:
        if nbytes:
            host = machines.devices[device].host
            found[host] = found.get(host, 0) + nbytes
    return found


def layer_copy_s(cost: ModelCost, spread: Spread) -> tuple[float, ...]:
    """Of each expert: seconds that copying a layer of it to the card takes, on average over those that are there."""
    if spread.in_process:
        shares = [share.copy_s for share in in_one_process(cost)]
    else:
        actors = spread.actors()
        shares = [of_actor(cost, actor).copy_s / len(actor) for actor in actors for _ in actor]
    return tuple(seconds / cost.mixture_layers for seconds in shares)
