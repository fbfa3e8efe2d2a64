"""`moe-ray status`: every actor of the running application, asked over Ray Serve."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.console import Console
from rich.table import Table

from moe_ray.errors import NotReady
from moe_ray.serve.app import APP_NAME

TIMEOUT_S = 5.0


def collect(address: str = "auto") -> dict[str, Any]:
    """Return {application, deployments: [{name, status, replicas, actors: [...]}]}. Raises `NotReady`."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not ray.is_initialized():
        try:
            ray.init(address=address, namespace="moe_ray", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NotReady(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from None
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        raise NotReady(f"the Ray cluster runs no application {APP_NAME!r}; start it with `moe-ray serve`")
    deployments = []
    for name, state in sorted(application.deployments.items(), key=lambda item: _order(item[0])):
        actors: list[Any] = []
        if name != "Gateway":
            try:
                handle = serve.get_deployment_handle(name, APP_NAME)
                actors = handle.broadcast("status").results(timeout_s=TIMEOUT_S, return_exceptions=True)
            except (RayServeException, RayError, TimeoutError):
                actors = []
        deployments.append(
            {
                "name": name,
                "status": state.status.value,
                "message": state.message,
                "replica_states": {str(getattr(k, "value", k)): n for k, n in state.replica_states.items()},
                "actors": [actor for actor in actors if isinstance(actor, dict)],
            }
        )
    return {"application": application.status.value, "deployments": deployments}


def print_status(console: Console, snapshot: dict[str, Any]) -> None:
    """Print a snapshot of `collect` as a table."""
    console.print(f"application [bold]{APP_NAME}[/]: {snapshot['application']}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("actor", "state", "node", "pid", "RSS", "PSS", "weights", "load"):
        table.add_column(column, justify="right" if column in ("pid", "RSS", "PSS", "weights") else "left")
    for deployment in snapshot["deployments"]:
        states = ", ".join(f"{n} {state.lower()}" for state, n in deployment["replica_states"].items())
        if not deployment["actors"]:
            table.add_row(
                deployment["name"], states or deployment["status"].lower(), "", "", "", "", "", deployment["message"]
            )
        for actor in deployment["actors"]:
            table.add_row(
                deployment["name"],
                states,
                actor["node_id"][:8],
                str(actor["pid"]),
                _mib(actor["rss_bytes"]),
                _mib(actor["pss_bytes"]),
                _mib(actor.get("weight_bytes") or actor["bytes_read"]),
                _load(actor),
            )
    console.print(table)


def _load(actor: dict[str, Any]) -> str:
    if "rows" in actor:
        return f"{actor['calls']:,} calls, {actor['rows']:,} rows, busy {actor['busy_s']:.1f} s, {actor['queued_rows']} queued"
    missing = f", missing {', '.join(actor['missing'])}" if actor["missing"] else ""
    used = actor["kv_blocks_total"] - actor["kv_blocks_free"]
    return (
        f"{actor['num_running']} running, {actor['num_waiting']} waiting, KV {used}/{actor['kv_blocks_total']} blocks, "
        f"{actor['generated_tokens']:,} tokens out{missing}"
    )


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def _order(name: str) -> tuple[int, int, str]:
    number = name.removeprefix("Expert")
    if name == "Gateway":
        return (0, 0, name)
    return (2, int(number), name) if number.isdigit() else (1, 0, name)
