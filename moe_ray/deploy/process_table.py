"""Every process of an application as one row each, from what `status.collect` has found. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

RUNNING: Final = "RUNNING"


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One replica of the gateway, of a trunk, or of an expert."""

    actor: str
    """The deployment's name."""
    state: str
    """running, or what keeps it from that."""
    pid: int | None = None
    """None: it does not answer, or has no process yet."""
    node: str = ""
    device: str = ""
    format: str = ""
    """What its weights are held as."""
    memory_bytes: int | None = None
    load: str = ""


def process_rows(snapshot: Mapping[str, Any]) -> list[ProcessRow]:
    """The rows of a snapshot of `status.collect`: replicas that answer, then those that Serve counts beside them."""
    rows = []
    for deployment in snapshot["deployments"]:
        name, actors = deployment["name"], deployment["actors"]
        rows += [_row(name, actor) for actor in sorted(actors, key=lambda actor: actor["pid"])]
        counts = {state: count for state, count in deployment["replica_states"].items() if count}
        silent = counts.pop(RUNNING, 0) - len(actors)
        rows += [ProcessRow(name, "does not answer")] * max(silent, 0)
        rows += [ProcessRow(name, state.lower()) for state, count in counts.items() for _ in range(count)]
        if not actors and silent <= 0 and not counts:
            rows.append(ProcessRow(name, deployment["status"].lower(), load=deployment["message"]))
    return rows


def _row(name: str, actor: Mapping[str, Any]) -> ProcessRow:
    return ProcessRow(
        actor=name,
        state=_state(actor),
        pid=actor["pid"],
        node=actor["node_id"],
        device=actor.get("device", "cpu"),  # a gateway computes nothing
        format=actor.get("format", ""),
        memory_bytes=actor["pss_bytes"] or actor["rss_bytes"],
        load=_load(actor),
    )


def _state(actor: Mapping[str, Any]) -> str:
    loaded, keys = actor.get("loaded_keys", 0), actor.get("keys", 0)
    if loaded < keys:
        return f"loading {loaded}/{keys}"
    return f"without {', '.join(actor['missing'])}" if actor.get("missing") else "running"


def _load(actor: Mapping[str, Any]) -> str:
    if "kv_blocks_total" in actor:
        used = 1 - actor["kv_blocks_free"] / max(actor["kv_blocks_total"], 1)
        return f"{actor['num_running']} running, {actor['num_waiting']} waiting, KV {used:.0%}"
    if "load" not in actor:
        return ""
    load = actor["load"]
    rows = sum(sum(layers) for layers in load["rows_per_layer"].values())
    return f"busy {load['busy']:.0%}, {rows / load['seconds'] if load['seconds'] else 0:,.0f} rows/s"
