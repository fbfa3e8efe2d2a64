"""Every name of Ray that Ray does not promise to keep, each behind a function or constant of ours (ray 2.60).

tests/deploy/test_ray_internals.py uses each of them and fails with what Ray changed. Importing this file loads no Ray.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LOCAL_SETTINGS: Final = {
    # Else Ray replaces 127.0.0.1 by the machine's own address, and half of its ports listen on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else every level of actors runs 15 steps lower
    # Every tenth of a second, by default: three per cent of a core that the experts could use.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # With --ingress haproxy, stopping waits for this long: for load balancers, of which there are none here.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
"""Environment of a Ray that we start ourselves: must be set before ray is imported."""
LATE_START: Final = "timed out during startup"
"""What Ray says where its processes were not up within half a minute: the machine was kept from starting them."""
HAPROXY_SETTING: Final = "RAY_SERVE_ENABLE_HA_PROXY"
AUTH_MODE: Final = "RAY_AUTH_MODE"
AUTH_TOKEN: Final = "RAY_AUTH_TOKEN"
AUTH_TOKEN_PATH: Final = "RAY_AUTH_TOKEN_PATH"
DEFAULT_TOKEN_FILE: Final = "~/.ray/auth_token"
USE_TLS: Final = "RAY_USE_TLS"
TEMP_DIR: Final = "RAY_TMPDIR"
"""Parent of the directory `ray` that sessions are in; default: TMPDIR, else /tmp."""
CURRENT_CLUSTER: Final = "ray/ray_current_cluster"
"""Below the temporary directory: the address of the cluster that `ray start` has started or joined last."""
LONGEST_SOCKET: Final = "ray/session_2026-12-31_23-59-59_123456_4194304/sockets/dash_MetricsHead"
"""The longest path below the temporary directory that Ray binds a Unix socket to."""


def start_on_loopback(**options: Any) -> Any:
    """`ray.init` of a new Ray, all of whose ports are on 127.0.0.1; returns its context."""
    import ray

    return ray.init(address="local", _node_ip_address="127.0.0.1", **options)


def ray_children() -> set[psutil.Process]:
    """The processes of Ray that this one has started itself: each runs a file of Ray's package."""
    import ray

    home = str(Path(ray.__file__).parent)
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(home in argument for argument in child.cmdline()):
                found.add(child)
    return found


def plasma_directory(directory: str) -> dict[str, str]:
    """The option of `ray.init` that puts the object store into `directory` instead of /dev/shm."""
    return {"_plasma_directory": directory}


def local_clusters() -> list[str]:
    """host:port of every Ray whose head runs on this machine, sorted."""
    from ray._private.services import find_gcs_addresses

    return sorted(find_gcs_addresses())


def keep_loopback_addresses(keep: bool) -> None:
    """Let `ray.init` of this process join 127.0.0.1 as it is, instead of the machine's own address."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = not keep


def show_own_token() -> None:
    """Let this process show the user's Ray token, if there is one, to the cluster that it joins."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def tokens_are_demanded() -> bool:
    """Whether the cluster that this process is connected to demands Ray's token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def serve_details() -> Mapping[str, Any]:
    """What Serve's REST API answers to `GET /api/serve/applications/`, without a dashboard; {} where no Serve runs."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return {} if client is None else client.get_serve_details()


def routed_replicas(handle: DeploymentHandle) -> dict[str, Mapping[str, Any]] | None:
    """Replica id → metadata, of the replicas that the handle's router knows; None where that cannot be seen (yet)."""
    router = getattr(getattr(handle, "_router", None), "_asyncio_router", None)
    replicas = getattr(getattr(router, "_request_router", None), "curr_replicas", None)
    if not isinstance(replicas, Mapping) or not handle.running_replicas_populated():
        return None
    found = dict(replicas).items()
    return {replica_id.unique_id: getattr(replica, "replica_metadata", {}) for replica_id, replica in found}


def replica_name(application: str, deployment: str, unique_id: str) -> str:
    """The full id of a Serve replica, which is its actor's name, too."""
    return f"SERVE_REPLICA::{application}#{deployment}#{unique_id}"


def kill_replica(replica_id: str) -> None:
    """End the process of a Serve replica, by its full id, at once. Raises `ValueError`: there is no such one.

    Serve learns of it by its health checks, as of any other death.
    """
    import ray

    ray.kill(ray.get_actor(replica_id, namespace="serve"), no_restart=True)


def key_value_store() -> Any:
    """The client of the key-value store of the cluster's head: internal_kv_put, _multi_get, _del."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
