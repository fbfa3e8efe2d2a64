"""What a Ray cluster is made of and runs: for `moe-ray doctor` and support bundles."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moe_ray.deploy.loading_board import NAMESPACE
from moe_ray.deploy.local_ray import join
from moe_ray.deploy.ray_internals import serve_details
from moe_ray.deploy.urls import url_of
from moe_ray.errors import NotReady


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One cluster, as this process sees it."""

    address: str
    fault: str | None = None
    """Why it cannot be joined; all else is empty then."""
    nodes: tuple[dict[str, Any], ...] = ()
    """As `ray.nodes()` has them."""
    resources: dict[str, float] | None = None
    available: dict[str, float] | None = None
    dashboard: str = ""
    """host:port."""
    applications: dict[str, str] | None = None
    """Serve's, name → status."""
    url: str = ""
    """Where Serve listens for HTTP."""

    @property
    def dead_nodes(self) -> int:
        """Nodes that were of the cluster and are gone."""
        return sum(not node.get("Alive") for node in self.nodes)


def cluster_state(address: str) -> ClusterState:
    """Join the cluster, look, and leave it again; a cluster that this process has joined already stays joined."""
    (state,) = each_cluster([address])
    return state


def each_cluster(addresses: Sequence[str]) -> Iterator[ClusterState]:
    """The state of each cluster, yielded while this process is joined to it."""
    joined = ray.is_initialized()
    for address in addresses:
        dashboard = ""
        try:
            if not joined:
                dashboard = join(address, namespace=NAMESPACE, logging_level=logging.ERROR).dashboard_url or ""
            state = _look(address, dashboard)
        except (NotReady, RayError, RayServeException) as error:
            state = ClusterState(address, fault=str(error))
        try:
            yield state
        finally:
            if not joined:
                ray.shutdown()


def _look(address: str, dashboard: str) -> ClusterState:
    http = serve_details().get("http_options") or {}
    running = serve.status().applications if http else {}
    return ClusterState(
        address=address,
        nodes=tuple(ray.nodes()),
        resources=ray.cluster_resources(),
        available=ray.available_resources(),
        dashboard=dashboard,
        applications={name: application.status.value for name, application in running.items()},
        url=url_of(http.get("host") or "", http.get("port") or 0) if http else "",
    )
