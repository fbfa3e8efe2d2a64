"""Finds the server that `status` and `scale` are about, among the Ray clusters of this machine or at an address."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray import serve

from moe_ray.deploy.loading_board import NAMESPACE
from moe_ray.deploy.local_ray import RAY_ADDRESS, join
from moe_ray.deploy.ray_internals import local_clusters, serve_details
from moe_ray.deploy.urls import url_of
from moe_ray.errors import ConfigError, NotReady

APP_NAME: Final = "moe-ray"
"""What `moe-ray serve` deploys. Not in `app`: commands that only ask need nothing of what is deployed."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A Ray cluster that runs the application."""

    address: str
    url: str
    """Where it listens for HTTP, as Serve was told."""


def find_application(address: str, name: str = APP_NAME) -> Any:
    """Connect this process to the cluster that runs application `name`, and return its Serve status.

    `auto` looks at $RAY_ADDRESS, else at every cluster of this machine. Raises `NotReady` where none runs the
    application, and `ConfigError` naming them where several do.
    """
    if ray.is_initialized():
        return _application(address, name)
    candidates = [address]
    if address == "auto" and not os.environ.get(RAY_ADDRESS):
        candidates = local_clusters() or candidates
    if len(candidates) == 1:
        _join(candidates[0])
        return _application(address, name)
    servers = _servers(candidates, name)
    if len(servers) > 1:
        raise ConfigError(which_one(servers))
    if not servers:
        raise NotReady(nothing_runs(address, name))
    _join(servers[0].address)
    return _application(address, name)


def which_one(servers: Sequence[RunningServer]) -> str:
    """The question that names every server."""
    named = " and ".join(f"--address {server.address} ({server.url})" for server in servers)
    return f"{len(servers)} servers run on this machine; say which one is meant: {named}"


def nothing_runs(address: str, name: str) -> str:
    """What is said where the application does not run."""
    where = "this machine" if address == "auto" else f"the Ray cluster at {address}"
    return f"{where} runs no application {name!r}; start it with `moe-ray serve`"


def _servers(candidates: Sequence[str], name: str) -> list[RunningServer]:
    """Those of the clusters that run the application; this process is connected to none afterwards."""
    found = []
    for candidate in candidates:
        try:
            _join(candidate)
        except NotReady as error:
            logging.getLogger(__name__).warning("%s", error)
            continue
        try:
            if name in serve.status().applications:
                http = serve_details().get("http_options") or {}
                found.append(RunningServer(candidate, url_of(http.get("host") or "", http.get("port") or 0)))
        finally:
            ray.shutdown()
    return found


def _join(address: str) -> None:
    join(address, namespace=NAMESPACE, logging_level=logging.ERROR)


def _application(address: str, name: str) -> Any:
    application = serve.status().applications.get(name)
    if application is None:
        raise NotReady(nothing_runs(address, name))
    return application
