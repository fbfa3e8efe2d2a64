"""Every actor of the running application, as its deployments' handles report it."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_ray.deploy.load_overview import busiest, by_replica, overview
from moe_ray.deploy.servers import APP_NAME, find_application
from moe_ray.experts.planning.placement import holds_experts, rank

TIMEOUT_S = 5.0


def collect(address: str = "auto", name: str = APP_NAME) -> dict[str, Any]:
    """Return {name, application, deployments: [{name, status, message, replica_states, actors: [...]}], load}.

    `load` is what the gateway answers to `GET /experts`.

    `address` and errors are those of `servers.find_application`.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    application = find_application(address, name)
    deployments = []
    for deployment, state in sorted(application.deployments.items(), key=lambda item: _order(item[0])):
        actors: list[Any] = []
        try:
            handle = serve.get_deployment_handle(deployment, name)
            actors = handle.broadcast("status").results(timeout_s=TIMEOUT_S, return_exceptions=True)
        except (RayServeException, RayError, TimeoutError):
            actors = []
        deployments.append(
            {
                "name": deployment,
                "status": state.status.value,
                "message": state.message,
                "replica_states": {str(getattr(k, "value", k)): n for k, n in state.replica_states.items()},
                "actors": [actor for actor in actors if isinstance(actor, dict)],
            }
        )
    load = overview({d["name"]: d["actors"] for d in deployments if holds_experts(d["name"])})
    return {"name": name, "application": application.status.value, "deployments": deployments, "load": load}


def print_status(console: Console, snapshot: dict[str, Any]) -> None:
    """Print a snapshot of `collect` as tables that fit 80 columns."""
    console.print(status_view(snapshot))


def status_view(snapshot: dict[str, Any]) -> RenderableType:
    """A snapshot of `collect`: its actors, and the load of its experts."""
    return Group(_actors(snapshot), *_load_lines(snapshot["load"]))


def _actors(snapshot: dict[str, Any]) -> RenderableType:
    nodes = {actor["node_id"] for deployment in snapshot["deployments"] for actor in deployment["actors"]}
    heading = Text.assemble(
        "application ", (snapshot["name"], "bold"), f": {snapshot['application']}, {len(nodes)} node(s)"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actor", "state", *(["node"] if len(nodes) > 1 else []), "pid", "memory", "weights", "load"):
        table.add_column(column, justify="right" if column in ("pid", "memory", "weights") else "left")
    for deployment in snapshot["deployments"]:
        states = ", ".join(f"{n} {state.lower()}" for state, n in deployment["replica_states"].items())
        states = states or deployment["status"].lower()
        node = [""] if len(nodes) > 1 else []
        if not deployment["actors"]:
            table.add_row(deployment["name"], states, *node, "", "", "", deployment["message"])
        for actor in deployment["actors"]:
            table.add_row(
                deployment["name"],
                states,
                *([actor["node_id"][:8]] if node else []),
                str(actor["pid"]),
                _mib(actor["pss_bytes"] or actor["rss_bytes"]),
                _mib(actor.get("weight_bytes") or actor.get("bytes_read")),
                _load(actor),
            )
    return Group(heading, table)


def _load_lines(load: dict[str, Any]) -> list[RenderableType]:
    if not any(expert["replicas"] for expert in load["experts"]):
        return []
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"last {load['window_s']:.0f} s")
    for column in ("pid", "busy", "rows/s", "rows/call", "wait ms", "queued rows"):
        table.add_column(column, justify="right")
    for replica in by_replica(load["experts"]):
        table.add_row(
            replica["deployment"],
            str(replica["pid"]),
            f"{replica['busy']:.0%}",
            f"{replica['rows_per_s']:,.0f}",
            f"{replica['rows_per_call']:,.1f}",
            f"{replica['queue_ms']:,.2f}",
            f"{replica['queued_rows']:,}",
        )
    imbalance = "none, for no rows were computed"
    if load["max_over_mean"] is not None:
        name = f"Expert{busiest(load['experts'])}"
        imbalance = f"{name} computed {load['max_over_mean']:.2f} times the rows of the mean expert"
    return ["", table, f"imbalance: {imbalance}"]


def _load(actor: dict[str, Any]) -> str:
    if "rows" in actor:
        queued = f", {actor['queued_rows']:,} queued" if actor["queued_rows"] else ""
        return f"{actor['rows']:,} rows, busy {actor['busy_s']:.1f} s{queued}"
    if "kv_blocks_total" not in actor:
        return ""
    used = 1 - actor["kv_blocks_free"] / actor["kv_blocks_total"]
    lines = [
        f"{actor['num_running']} running, {actor['num_waiting']} waiting",
        f"KV {used:.0%}, {actor['generated_tokens']:,} tokens out",
    ]
    if actor["missing"]:
        lines.append(f"missing {', '.join(actor['missing'])}")
    return "\n".join(lines)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def _order(name: str) -> tuple[bool, tuple[int, int], str]:
    return name != "Gateway", rank(name), name
