"""Trunks and experts as the page shows them, put together from what Serve and the replicas say. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.deploy.load_overview import overview
from moe_ray.deploy.ray_internals import replica_name
from moe_ray.experts.planning.placement import experts_in, rank

_STATES: Final = {
    "STARTING": "starting",
    "UPDATING": "starting",
    "RECOVERING": "starting",
    "RUNNING": "running",
    "STOPPING": "stopping",
    "PENDING_MIGRATION": "stopping",
}
"""Serve's state of a replica → the page's."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the page has to know of the model."""

    name: str
    layers: int
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment: how many replicas Serve wants, and the state of each, by its full id."""

    wanted: int
    states: Mapping[str, str]


def deployed(application: str, details: Mapping[str, Any]) -> dict[str, Deployed]:
    """Name → state of each deployment of an application, from Serve's details; {} where it is not there."""
    found = details.get("applications", {}).get(application, {}).get("deployments", {})
    return {
        name: Deployed(
            state["target_num_replicas"],
            {
                replica_name(application, name, each["replica_id"]): _STATES.get(_word(each["state"]), "starting")
                for each in state["replicas"]
            },
        )
        for name, state in found.items()
    }


def house_view(
    facts: ModelFacts,
    deployments: Mapping[str, Deployed],
    trunks: Mapping[str, Sequence[Mapping[str, Any]]],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    missing: Sequence[str],
) -> dict[str, Any]:
    """Return {model, layers, num_experts, top_k, missing, trunks, experts, window_s, max_over_mean}.

    `trunks`: deployment → what each trunk answers to `load`. `answers`: the same of experts. Replicas that Serve knows
    and that do not answer are listed with their state alone.
    """
    load = overview(answers)
    by_id = {answer["replica_id"]: answer for every in answers.values() for answer in every}
    return {
        "model": facts.name,
        "layers": facts.layers,
        "num_experts": facts.experts,
        "top_k": facts.top_k,
        "missing": list(missing),
        "trunks": [one for name, told in trunks.items() for one in _trunks(told, deployments.get(name))],
        "experts": [_expert(expert, deployments, by_id) for expert in load["experts"]],
        "window_s": load["window_s"],
        "max_over_mean": load["max_over_mean"],
    }


def _trunks(answers: Sequence[Mapping[str, Any]], known: Deployed | None) -> list[dict[str, Any]]:
    told = {answer["replica_id"]: _trunk(answer, known) for answer in answers}
    silent = {} if known is None else {each: state for each, state in known.states.items() if each not in told}
    return [
        *[told[each] for each in sorted(told)],
        *[{"replica_id": each, "state": _unanswered(state)} for each, state in sorted(silent.items())],
    ]


def _trunk(answer: Mapping[str, Any], known: Deployed | None) -> dict[str, Any]:
    return {
        "replica_id": answer["replica_id"],
        "model": answer["model"],
        "node": answer["node_id"][:8],
        "pid": answer["pid"],
        "state": _state(answer["replica_id"], known),
        "device": answer["device"],
        "format": answer["format"],
        "running": answer["num_running"],
        "waiting": answer["num_waiting"],
        "kv_use": 1 - answer["kv_blocks_free"] / max(answer["kv_blocks_total"], 1),
        "kv_cache_tokens": answer["kv_cache_tokens"],
        "max_model_len": answer["max_model_len"],
        "generated_tokens": answer["generated_tokens"],
        "missing": answer["missing"],
    }


def _expert(
    expert: Mapping[str, Any], deployments: Mapping[str, Deployed], by_id: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    number = expert["expert"]
    holder = next((name for name in sorted(deployments, key=rank) if number in experts_in(name)), None)
    known = None if holder is None else deployments[holder]
    told = {replica["replica_id"] for replica in expert["replicas"]}
    silent = {} if known is None else {each: state for each, state in known.states.items() if each not in told}
    replicas = [_replica(each, by_id[each["replica_id"]], deployments) for each in expert["replicas"]]
    return {
        "expert": number,
        "deployment": holder,
        "wanted": None if known is None else known.wanted,
        "rows_per_s": expert["rows_per_s"],
        "rows_per_layer": expert["rows_per_layer"],
        "busy": expert["busy"],
        "replicas": [
            *replicas,
            *[{"replica_id": each, "state": _unanswered(state)} for each, state in sorted(silent.items())],
        ],
    }


def _replica(
    replica: Mapping[str, Any], answer: Mapping[str, Any], deployments: Mapping[str, Deployed]
) -> dict[str, Any]:
    state = _state(replica["replica_id"], deployments.get(replica["deployment"]))
    loading = state == "running" and answer["loaded_keys"] < answer["keys"]
    return {
        "replica_id": replica["replica_id"],
        "deployment": replica["deployment"],
        "node": replica["node_id"][:8],
        "pid": replica["pid"],
        "state": "loading" if loading else state,
        "loaded": answer["loaded_keys"] / max(answer["keys"], 1),
        "device": answer["device"],
        "format": answer["format"],
        **{name: replica[name] for name in ("busy", "rows_per_s", "queue_ms", "queued_rows", "weight_bytes")},
    }


def _state(replica_id: str, known: Deployed | None) -> str:
    """Of a replica that answers."""
    return "running" if known is None else known.states.get(replica_id, "stopping")


def _unanswered(state: str) -> str:
    """Of a replica that does not answer: one that Serve still takes for running is gone or hangs."""
    return "away" if state == "running" else state


def _word(state: Any) -> str:
    return str(getattr(state, "value", state)).upper()
