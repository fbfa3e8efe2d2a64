"""The load of all experts side by side, from what their replicas say: for `GET /experts` and `moe-ray status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from moe_ray.experts.planning.placement import experts_in, rank
from moe_ray.experts.server.load_counters import WINDOW_S


def overview(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return {experts: [{expert, replicas, rows_per_layer, rows_per_s, busy}], window_s, max_over_mean}.

    `answers`: deployment → what each of its replicas answers to `load` or `status`. A replica that holds several
    experts is listed under each, with the rows of that expert; how busy it is and what waits is said of the whole
    replica. An expert of whom nobody answers has no replicas here. `max_over_mean`: rows of the busiest expert in the
    window over the mean of those that answer; None while there are no rows.
    """
    found: dict[int, list[dict[str, Any]]] = {expert: [] for name in answers for expert in experts_in(name)}
    for name in sorted(answers, key=rank):
        for answer in sorted(answers[name], key=lambda answer: answer["replica_id"]):
            for expert in answer["load"]["rows_per_layer"]:
                found.setdefault(expert, []).append(_replica(name, expert, answer))
    experts = [_expert(expert, found[expert]) for expert in sorted(found)]
    rows = [sum(expert["rows_per_layer"]) for expert in experts if expert["replicas"]]
    imbalance = max(rows) * len(rows) / sum(rows) if any(rows) else None
    return {"experts": experts, "window_s": WINDOW_S, "max_over_mean": imbalance}


def busiest(experts: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the expert with the most rows, of an overview's `experts` (at least one)."""
    return max(experts, key=lambda expert: sum(expert["rows_per_layer"]))["expert"]


def by_replica(experts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every replica of an overview's `experts` once, by deployment, with the rows/s of all it holds."""
    found: dict[str, dict[str, Any]] = {}
    for expert in experts:
        for replica in expert["replicas"]:
            whole = found.setdefault(replica["replica_id"], {**replica, "rows_per_s": 0.0})
            whole["rows_per_s"] += replica["rows_per_s"]
    return sorted(found.values(), key=lambda replica: (rank(replica["deployment"]), replica["replica_id"]))


def _expert(expert: int, replicas: list[dict[str, Any]]) -> dict[str, Any]:
    layers = [replica["rows_per_layer"] for replica in replicas]
    return {
        "expert": expert,
        "replicas": replicas,
        "rows_per_layer": [sum(rows) for rows in zip_longest(*layers, fillvalue=0)],
        "rows_per_s": sum(replica["rows_per_s"] for replica in replicas),
        "busy": sum(replica["busy"] for replica in replicas) / max(len(replicas), 1),  # mean
    }


def _replica(deployment: str, expert: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    load = answer["load"]
    rows = load["rows_per_layer"][expert]
    return {
        "deployment": deployment,
        **{name: answer[name] for name in ("replica_id", "node_id", "pid")},
        "rows_per_layer": list(rows),
        "rows_per_s": sum(rows) / load["seconds"] if load["seconds"] else 0.0,
        **{name: load[name] for name in ("busy", "rows_per_call", "queue_ms")},
        **{name: answer[name] for name in ("queued_rows", "weight_bytes")},
    }
