"""The load of all experts side by side, from what their replicas say: for `GET /experts` and `moe-ray status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from moe_ray.experts.load import WINDOW_S


def overview(answers: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return {experts: [{expert, replicas, rows_per_layer, rows_per_s, busy}], window_s, max_over_mean}.

    `answers`: expert → what each of its replicas answers to `load` or `status`; an expert that does not answer has no
    replicas here. `max_over_mean`: rows of the busiest expert in the window over the mean of those that answer; None
    while there are no rows.
    """
    experts = [_expert(expert, answers[expert]) for expert in sorted(answers)]
    rows = [sum(expert["rows_per_layer"]) for expert in experts if expert["replicas"]]
    imbalance = max(rows) * len(rows) / sum(rows) if any(rows) else None
    return {"experts": experts, "window_s": WINDOW_S, "max_over_mean": imbalance}


def busiest(experts: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of the expert with the most rows, of an overview's `experts` (at least one)."""
    return max(experts, key=lambda expert: sum(expert["rows_per_layer"]))["expert"]


def _expert(expert: int, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    replicas = [_replica(answer) for answer in sorted(answers, key=lambda answer: answer["replica_id"])]
    layers = [answer["load"]["rows_per_layer"] for answer in answers]
    return {
        "expert": expert,
        "replicas": replicas,
        "rows_per_layer": [sum(rows) for rows in zip_longest(*layers, fillvalue=0)],
        "rows_per_s": sum(replica["rows_per_s"] for replica in replicas),
        "busy": sum(replica["busy"] for replica in replicas) / max(len(replicas), 1),  # mean
    }


def _replica(answer: Mapping[str, Any]) -> dict[str, Any]:
    load = answer["load"]
    return {
        **{name: answer[name] for name in ("replica_id", "node_id", "pid")},
        **{name: load[name] for name in ("busy", "rows_per_s", "rows_per_call", "queue_ms")},
        **{name: answer[name] for name in ("queued_rows", "weight_bytes")},
    }
