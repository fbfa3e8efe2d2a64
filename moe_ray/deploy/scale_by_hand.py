"""Sets replicas of experts and trunk by hand while the application serves, and waits until they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray import serve
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moe_ray.deploy.peers import find_peers
from moe_ray.deploy.ray_internals import serve_details
from moe_ray.deploy.replica_numbers import change
from moe_ray.deploy.replica_targets import TRUNK
from moe_ray.deploy.servers import APP_NAME, find_application, nothing_runs
from moe_ray.errors import ConfigError, NotReady
from moe_ray.experts.planning.placement import experts_in

TIMEOUT_S: Final = 600.0
"""How long replicas may take to start: a cluster may have to start machines."""
ASK_TIMEOUT_S: Final = 5.0
SETTLED_S: Final = 2.0
"""Serve reads the numbers set by hand every half second; until then nothing may have changed yet."""


def parse_units(words: Sequence[str]) -> list[int | str]:
    """Return the experts' numbers, and `TRUNK` for its name. Raises `ConfigError` on any other word."""
    units: list[int | str] = []
    for word in words:
        if word != TRUNK and not word.isdecimal():
            raise ConfigError(f"{word!r}: expected the number of an expert, or `{TRUNK}`")
        units.append(TRUNK if word == TRUNK else int(word))
    return units


def scale(
    units: Sequence[int | str],
    replicas: int | None,
    console: Console,
    address: str = "auto",
    application: str = APP_NAME,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Run exactly `replicas` of the deployments of `units`, or as many as their policies decide where None.

    `units` are experts' numbers, or `TRUNK`. Returns when they run (and those to go are gone). Raises `ConfigError` on
    an expert that is not there or a number beyond its limit, before anything is changed; `NotReady` where no
    application serves or replicas do not come up.
    """
    if not ray.is_initialized():
        find_application(address, application)
    names = change(units, replicas, application, _deployments(application, address))
    for expert in sorted(unit for unit in set(units) if isinstance(unit, int)):
        shared = [name for name in names if expert in experts_in(name) and len(experts_in(name)) > 1]
        for name in shared:
            console.print(f"{name} holds expert {expert}")
    _wait(names, replicas, console, application, timeout_s)


def _deployments(application: str, address: str) -> Mapping[str, Any]:
    """Name → Serve's details of each deployment."""
    details = serve_details().get("applications", {}).get(application)
    if details is not None:
        return details["deployments"]
    raise NotReady(nothing_runs(address, application))


def _wait(names: Sequence[str], replicas: int | None, console: Console, application: str, timeout_s: float) -> None:
    end, settled = time.monotonic() + timeout_s, time.monotonic() + SETTLED_S
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=replicas, state="") for name in names}
        while True:
            deployments = serve.status().applications[application].deployments
            waiting = []
            for name, task in tasks.items():
                status = deployments[name]
                states = {str(getattr(k, "value", k)).lower(): n for k, n in status.replica_states.items() if n}
                running = states.pop("running", 0)
                if not states and experts_in(name) and (late := _loading(name, application)):
                    running, states["loading"] = running - late, late  # they run, but serve some of their layers only
                state = ", ".join(f"{n} {what}" for what, n in sorted(states.items()))
                progress.update(task, completed=running, total=replicas or running + sum(states.values()), state=state)
                if states or (replicas is not None and running != replicas):
                    waiting.append((name, running, status.message))
            if not waiting and (replicas is not None or time.monotonic() > settled):
                return
            if time.monotonic() > end:
                name, running, message = waiting[0]
                raise NotReady(f"{name} runs {running} replicas after {timeout_s:g} s: {message or 'no reason'}")
            time.sleep(0.1)


def _loading(name: str, application: str) -> int:
    """Count the replicas of a deployment of experts that do not serve all of their layers yet."""
    try:
        return sum(info.loading for info in find_peers(name, application, ASK_TIMEOUT_S)())
    except NotReady:
        return 0  # none runs, as its states say
