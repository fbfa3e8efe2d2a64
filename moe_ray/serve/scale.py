"""`moe-ray scale`: sets the replicas of experts by hand while the application serves, and waits until they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray import serve
from ray.serve.context import _get_global_client
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moe_ray.errors import ConfigError, NotReady
from moe_ray.serve.app import APP_NAME
from moe_ray.serve.scaling import POLICY, set_replicas
from moe_ray.serve.status import find_application

TIMEOUT_S: Final = 600.0
"""How long replicas may take to start: a cluster may have to start machines."""
SETTLED_S: Final = 2.0
"""Serve reads the numbers set by hand every half second; until then nothing may have changed yet."""


def scale(
    experts: Sequence[int],
    replicas: int | None,
    console: Console,
    address: str = "auto",
    application: str = APP_NAME,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Run exactly `replicas` of each of `experts`, or as many as the policy decides where None.

    Returns when they run (and those to go are gone). Raises `ConfigError` on an expert that is not there or a number
    beyond its limit, before anything is changed; `NotReady` where no application serves or replicas do not come up.
    """
    if not ray.is_initialized():
        find_application(address)
    deployments = _deployments(application, address)
    for expert in experts:
        _check(expert, replicas, deployments)
    set_replicas(application, experts, replicas)
    _wait(sorted(set(experts)), replicas, console, application, timeout_s)


def _deployments(application: str, address: str) -> Mapping[str, Any]:
    """Name → Serve's details of each deployment."""
    if ray.is_initialized():
        details = _get_global_client().get_serve_details()["applications"].get(application)
        if details is not None:
            return details["deployments"]
    where = "this machine" if address == "auto" else f"the Ray cluster at {address}"
    raise NotReady(f"{where} runs no application {application!r}; start it with `moe-ray serve`")


def _check(expert: int, replicas: int | None, deployments: Mapping[str, Any]) -> None:
    known = sorted(int(name.removeprefix("Expert")) for name in deployments if name.removeprefix("Expert").isdigit())
    if not known:
        raise ConfigError(
            "the experts of this application run inside its trunk (`transport: local`) and have no replicas"
        )
    if expert not in known:
        raise ConfigError(f"no expert {expert}: this model has {known[0]} to {known[-1]}")
    scaling = deployments[f"Expert{expert}"]["deployment_config"]["autoscaling_config"]
    if scaling is None or scaling["policy"]["policy_function"] != POLICY:
        raise ConfigError(
            f"the Serve config file of this application sets the replicas of Expert{expert}: change it there"
        )
    if replicas is not None and not 1 <= replicas <= scaling["max_replicas"]:
        most = scaling["max_replicas"]
        raise ConfigError(f"--replicas {replicas}: must be 1 to {most} (`experts.max_replicas_by_hand`)")


def _wait(experts: Sequence[int], replicas: int | None, console: Console, application: str, timeout_s: float) -> None:
    end, settled = time.monotonic() + timeout_s, time.monotonic() + SETTLED_S
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=console) as progress:
        tasks = {e: progress.add_task(f"Expert{e}", total=replicas, state="") for e in experts}
        while True:
            deployments = serve.status().applications[application].deployments
            waiting = []
            for expert, task in tasks.items():
                status = deployments[f"Expert{expert}"]
                states = {str(getattr(k, "value", k)).lower(): n for k, n in status.replica_states.items() if n}
                running = states.pop("running", 0)
                state = ", ".join(f"{n} {name}" for name, n in sorted(states.items()))
                progress.update(task, completed=running, total=replicas or running + sum(states.values()), state=state)
                if states or (replicas is not None and running != replicas):
                    waiting.append((expert, running, status.message))
            if not waiting and (replicas is not None or time.monotonic() > settled):
                return
            if time.monotonic() > end:
                expert, running, message = waiting[0]
                raise NotReady(
                    f"Expert{expert} runs {running} replicas after {timeout_s:g} s: {message or 'no reason'}"
                )
            time.sleep(0.1)
