"""What `moe-ray plan` and the start of `moe-ray serve` print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from moe_ray.commands.balance_report import Balanced, balance_json
from moe_ray.commands.network_report import Distance, network_json
from moe_ray.commands.planned import GB, GIB, Planned, SharedExperts, size
from moe_ray.experts.planning.cards import smallest_card
from moe_ray.experts.planning.footprint import ActorPlan
from moe_ray.experts.planning.offload import PCIE_GB_S, PCIE_SHARE


def print_plan(console: Console, planned: Planned, gpu_gib: float | None, for_cards: bool = False) -> None:
    """Print the plan as a table; with `gpu_gib`, what fits cards of that size; `for_cards`: the smallest that do."""
    model, plan = planned.model, planned.plan
    console.print(
        f"[bold]{planned.model_name}[/]  {plan.total_parameters / 1e9:.2f} B parameters, "
        f"{model.num_hidden_layers} layers, {model.num_local_experts} experts, top {model.num_experts_per_tok}, "
        f"{plan.dtype}, {size(plan.total_bytes)} in all"
    )
    console.print(str(planned.directory), style="dim", markup=False, soft_wrap=True)
    if gpu_gib is not None:
        console.print(f"on cards, in {plan.dtype}; this machine's CPU does not count", style="dim")
    if planned.unseen_quantization is not None:
        console.print(
            f"its weights are quantised with {planned.unseen_quantization}; they are not here, so this is the plan of "
            f"weights in the formats named below (--quantize sets another)",
            style="yellow",
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actor", "parameters", "held as", "weights"):
        table.add_column(column, justify="left" if column in ("actor", "held as") else "right")
    if planned.bytes_to_read:
        table.add_column("reads from disk", justify="right")
    if gpu_gib is not None:
        table.add_column(f"on {gpu_gib:g} GiB", justify="right")
    elif for_cards:
        table.add_column("smallest card")
    fits = plan.fits(int(gpu_gib * GIB)) if gpu_gib is not None else []
    for i, actor in enumerate(plan.actors):
        row = [actor.name, f"{actor.parameters / 1e6:,.1f} M", ", ".join(actor.held_as), size(actor.weight_bytes)]
        if planned.bytes_to_read:
            row.append(size(planned.bytes_to_read[actor.name]))
        if fits:
            _, ok, tokens = fits[i]
            row.append(("fits" + (f", {tokens:,} KV tokens" if tokens else "")) if ok else "does not fit")
        elif for_cards:
            row.append(_said(smallest_card(plan.need_bytes(actor))))
        table.add_row(*row)
    console.print(table)
    if offloaded := [actor for actor in plan.actors if actor.host.host_bytes]:
        _print_offloaded(console, offloaded)
    if planned.shared is not None:
        _print_shared(console, planned.shared)
    if for_cards:
        _print_whole(console, planned)
    console.print(
        f"KV cache in {plan.kv_cache_dtype}: {plan.kv_bytes_per_token:,} B a token, "
        f"{size(plan.kv_bytes_per_token * plan.context)} for one sequence of {plan.context:,} tokens"
    )
    if (draft := plan.draft) is not None:
        console.print(
            f"draft model, in each trunk: {draft.parameters / 1e6:,.1f} M parameters, {size(draft.weight_bytes)}; "
            f"{draft.kv_bytes_per_token:,} B a token of that KV cache are its own"
        )


def _print_offloaded(console: Console, actors: Sequence[ActorPlan]) -> None:
    """What stays in the host's memory, and what copying it takes: each actor's over a link of its own, or, of experts
    that share their buffers, all of it over the one link of their process's card."""
    most = max(actors, key=lambda actor: actor.host.host_bytes)
    same = all(actor.host.host_bytes == most.host.host_bytes for actor in actors)
    whose = f"{actors[0].name} to {actors[-1].name} each keep" if same and len(actors) > 1 else f"{most.name} keeps"
    held, copy_s = f"{size(most.card_bytes)} on the card", most.host.copy_s
    if any(not actor.host.buffer_bytes for actor in actors):
        held = f"{size(sum(actor.card_bytes for actor in actors))} of all of them on the card"
        copy_s = sum(actor.host.copy_s for actor in actors)
    console.print(
        f"{whose} {size(most.host.host_bytes)} in the host's memory, {held}: a step that "
        f"calls all those layers copies them in {1e3 * copy_s:,.0f} ms, at {PCIE_SHARE:.0%} (assumed) of "
        f"PCIe 3.0 x16's {PCIE_GB_S:g} GB/s; that is slower than all on the card",
        soft_wrap=True,
    )


def _print_shared(console: Console, shared: SharedExperts) -> None:
    """What all models take together, against the first one alone and against each by itself."""
    console.print(
        f"all models: {size(shared.total_bytes)}, {shared.total_bytes / shared.alone_bytes:.2f} times the first one "
        f"alone ({size(shared.alone_bytes)}); each by itself: {size(shared.separate_bytes)}. Experts held once for "
        f"several models: {size(shared.shared_bytes)}; of variants alone: {size(shared.added_expert_bytes)}",
        soft_wrap=True,
    )


def _print_whole(console: Console, planned: Planned) -> None:
    """The whole model in the units in which others state it, and the card that would hold it alone."""
    plan = planned.plan
    scales = plan.total_scale_bytes
    parts = f", of which {scales / GB:.1f} GB are scales" if scales else ""
    alone = _said(smallest_card(plan.whole_need_bytes))
    console.print(f"all weights: {plan.total_bytes / GB:.1f} GB{parts}; on one card: {alone}", soft_wrap=True)


def _said(card: tuple[int, str] | None) -> str:
    return "none" if card is None else f"{card[0]} GiB ({card[1]})"


def _json_card(card: tuple[int, str] | None) -> dict[str, object] | None:
    return None if card is None else {"gib": card[0], "cards": card[1].split(", ")}


def _shared_json(shared: SharedExperts) -> dict[str, object]:
    return {
        **asdict(shared),
        "added_expert_bytes": shared.added_expert_bytes,
        "shared_bytes": shared.shared_bytes,
    }


def plan_json(
    planned: Planned,
    gpu_gib: float | None,
    balanced: Balanced | None = None,
    distance: Distance | None = None,
    fleet: Mapping[str, object] | None = None,
) -> str:
    """The plan as one JSON object; `balanced` is under "balance", `distance` under "network", `fleet` under "fleet"."""
    plan = planned.plan
    fits = {a.name: ok for a, ok, _ in plan.fits(int(gpu_gib * GIB))} if gpu_gib is not None else {}
    rows = [
        {
            "actor": actor.name,
            "parameters": actor.parameters,
            "held_as": list(actor.held_as),
            "weight_bytes": actor.weight_bytes,
            "scale_bytes": actor.scale_bytes,
            "read_bytes": planned.bytes_to_read.get(actor.name),
            **({"host_bytes": actor.host.host_bytes, "card_bytes": actor.card_bytes} if actor.host.host_bytes else {}),
            "smallest_card": _json_card(smallest_card(plan.need_bytes(actor))),
            **({"fits": fits[actor.name]} if fits else {}),
        }
        for actor in plan.actors
    ]
    return json.dumps(
        {
            "model": planned.model_name,
            "dtype": plan.dtype,
            "unseen_quantization": planned.unseen_quantization,
            "total_weight_bytes": plan.total_bytes,
            "total_scale_bytes": plan.total_scale_bytes,
            "smallest_card_for_all": _json_card(smallest_card(plan.whole_need_bytes)),
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "kv_cache_dtype": plan.kv_cache_dtype,
            "context": plan.context,
            **({} if plan.draft is None else {"draft_model": asdict(plan.draft)}),
            **({} if planned.shared is None else {"variants": _shared_json(planned.shared)}),
            "rows": rows,
            **({} if balanced is None else {"balance": balance_json(planned, balanced)}),
            **({} if distance is None else {"network": network_json(planned, distance)}),
            **({} if fleet is None else {"fleet": fleet}),
        },
        indent=1,
    )
