"""Checks of Ray: addresses that lead nowhere, clusters of this machine, the servers on them."""

from __future__ import annotations

import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from moe_ray.deploy.cluster_state import ClusterState, cluster_state
from moe_ray.deploy.local_ray import RAY_ADDRESS, unreachable
from moe_ray.deploy.places import ray_directory
from moe_ray.deploy.ray_internals import CURRENT_CLUSTER, local_clusters
from moe_ray.deploy.urls import open_directly
from moe_ray.doctor.finding import Finding, Subject, error, ok, warning
from moe_ray.errors import ConfigError

ADDRESS_TIMEOUT_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class RayFacts:
    """What is known of Ray on this machine."""

    version: str
    address: str
    """Of the cluster that is asked for; `auto`: any of this machine."""
    variable: str | None
    """RAY_ADDRESS."""
    fault: str | None
    """Why no cluster can be at that address."""
    file: Path | None
    """Where `ray start` notes the cluster's address."""
    noted: str | None
    """What stands there."""
    noted_fault: str | None
    clusters: tuple[ClusterState, ...]
    dashboard_faults: Mapping[str, str]
    """Dashboard's address → why it does not answer."""


def ray_facts(subject: Subject) -> RayFacts:
    """Look for clusters and join each that can be reached."""
    addresses, fault = cluster_addresses(subject)
    file = _address_file(subject)
    noted = _noted(file)
    clusters = tuple(map(cluster_state, addresses))
    dashboards = [cluster.dashboard for cluster in clusters if cluster.dashboard]
    faults = {dashboard: said for dashboard in dashboards if (said := _dashboard_fault(dashboard))}
    return RayFacts(
        version=metadata.version("ray"),
        address=_asked(subject),
        variable=subject.environ.get(RAY_ADDRESS),
        fault=fault,
        file=file,
        noted=noted,
        noted_fault=unreachable(noted, ADDRESS_TIMEOUT_S) if noted else None,
        clusters=clusters,
        dashboard_faults=faults,
    )


def check_addresses(facts: RayFacts) -> list[Finding]:
    """Addresses that commands follow lead to a cluster."""
    found = []
    if facts.fault is not None:
        meant = facts.address == facts.variable
        mend = f"unset {RAY_ADDRESS}" if meant else "give --address of a cluster that runs"
        found.append(error("ray address", facts.fault + (f" (${RAY_ADDRESS})" if meant else ""), mend))
    if facts.noted_fault is not None:
        says = f"{facts.file} names {facts.noted}, where no cluster is any more: {facts.noted_fault}"
        found.append(warning("ray address", says, f"ray stop, or rm {facts.file}"))
    return found or [ok("ray address", facts.noted or facts.address)]


def check_clusters(facts: RayFacts) -> list[Finding]:
    """Clusters can be joined (which demands the same Ray, Python and token), and their nodes live."""
    if facts.fault is not None:
        return []  # there is none to look at
    found = []
    for cluster in facts.clusters:
        if cluster.fault is not None:
            mend = "use the Ray, Python and token (~/.ray/auth_token) of the cluster's head, or ray stop"
            found.append(error("ray clusters", f"{cluster.fault} (this is Ray {facts.version})", mend))
        elif cluster.dead_nodes:
            says = f"{cluster.address}: {cluster.dead_nodes} of {len(cluster.nodes)} nodes are gone"
            found.append(warning("ray clusters", says, "start them again; ray list nodes names them"))
        if cluster.dashboard in facts.dashboard_faults:
            says = f"{cluster.address}: its dashboard at {cluster.dashboard} does not answer"
            says += f" ({facts.dashboard_faults[cluster.dashboard]})"
            found.append(warning("ray clusters", says, "`ray list` and `serve status` need it: see dashboard.log"))
    names = ", ".join(f"{cluster.address} ({len(cluster.nodes)} nodes)" for cluster in facts.clusters)
    return found or [ok("ray clusters", f"Ray {facts.version}; {names or 'none runs'}")]


def check_servers(facts: RayFacts) -> list[Finding]:
    """At most one server, and it is well."""
    if facts.fault is not None:
        return []
    running = [(each, name, status) for each in facts.clusters for name, status in (each.applications or {}).items()]
    found = []
    if len({cluster.address for cluster, _, _ in running}) > 1:
        named = " and ".join(f"--address {cluster.address} ({cluster.url})" for cluster, _, _ in running)
        found.append(
            warning("servers", f"{len(running)} run on this machine: {named}", "give status, ps and scale one")
        )
    for cluster, name, status in running:
        if status != "RUNNING":
            says = f"application {name!r} at {cluster.address} is {status}"
            found.append(error("servers", says, f"moe-ray status --address {cluster.address}"))
    said = ", ".join(f"{name} at {cluster.url}: {status}" for cluster, name, status in running)
    return found or [ok("servers", said or "none runs")]


def examine_ray(subject: Subject) -> Sequence[Finding]:
    """Addresses, clusters, servers."""
    facts = ray_facts(subject)
    return [*check_addresses(facts), *check_clusters(facts), *check_servers(facts)]


def cluster_addresses(subject: Subject) -> tuple[list[str], str | None]:
    """Clusters to join: the one that is asked for, else all of this machine; and why there is none at its address."""
    asked = _asked(subject)
    if asked == "auto":
        return local_clusters(), None
    fault = unreachable(asked, ADDRESS_TIMEOUT_S)
    return ([], f"no Ray cluster at {asked}: {fault}") if fault else ([asked], None)


def _asked(subject: Subject) -> str:
    return (subject.environ.get(RAY_ADDRESS) or "auto") if subject.address == "auto" else subject.address


def _address_file(subject: Subject) -> Path | None:
    try:
        return ray_directory(subject.environ) / CURRENT_CLUSTER
    except ConfigError:
        return None


def _noted(file: Path | None) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None if file is not None else None
    except OSError:
        return None


def _dashboard_fault(dashboard: str) -> str | None:
    try:
        open_directly(f"http://{dashboard}/api/version", ADDRESS_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answers: that it wants a token is no fault
    except OSError as failure:
        return str(failure)
    return None
