"""Each private name of Ray that the program uses: a failure here says what Ray has changed. No Ray is started."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import ray
from ray import serve

import moe_ray
from moe_ray.deploy import ray_internals

RAY = Path(ray.__file__).parent
PRIVATE = re.compile(
    r"\bray(\.\w+)*\._|\b_actor_id\b|\b_router\b|_get_global_client|internal_kv_get|\b_node_ip_address"
)


def source(*parts: str) -> str:
    path = RAY.joinpath(*parts)
    assert path.exists(), f"Ray has no file {path.relative_to(RAY)} any more"
    return path.read_text(encoding="utf-8")


def test_only_one_file_uses_private_names() -> None:
    root = Path(moe_ray.__file__).parent
    users = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(PRIVATE.search(line) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert users == {"deploy/ray_internals.py"}


def test_clusters_of_this_machine_are_listed() -> None:
    found = ray_internals.local_clusters()
    assert all(re.fullmatch(r".+:\d+", address) for address in found), f"find_gcs_addresses returns {found} now"


def test_loopback_addresses_can_be_kept() -> None:
    from ray._private import ray_constants

    assert hasattr(ray_constants, "ENABLE_RAY_CLUSTER"), "Ray has no ray_constants.ENABLE_RAY_CLUSTER any more"
    before = ray_constants.ENABLE_RAY_CLUSTER
    try:
        ray_internals.keep_loopback_addresses(True)
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
    assert "ENABLE_RAY_CLUSTER" in source("_private", "services.py"), "Ray no longer asks it for the node's address"


def test_own_token_can_be_shown() -> None:
    from ray._private.authentication import authentication_token_setup as setup

    function = getattr(setup, "maybe_enable_token_auth_if_token_available", None)
    assert function is not None, "Ray has no maybe_enable_token_auth_if_token_available any more"
    assert "warn_if_disabled" in inspect.signature(function).parameters


def test_where_ray_looks_for_a_token() -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    assert _get_default_token_path() == Path(ray_internals.DEFAULT_TOKEN_FILE).expanduser()
    library = (RAY / "_raylet.so").read_bytes()
    for name in (ray_internals.AUTH_TOKEN_PATH, ray_internals.AUTH_TOKEN):
        assert name.encode() in library, f"Ray does not read {name} any more"
    assert ray_internals.AUTH_MODE in source("_private", "authentication", "authentication_token_setup.py")


def test_whether_tokens_are_demanded_is_told() -> None:
    assert ray_internals.tokens_are_demanded() in (True, False)


def test_serve_tells_its_details() -> None:
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    assert "raise_if_no_controller_running" in inspect.signature(context._get_global_client).parameters
    assert hasattr(ServeControllerClient, "get_serve_details"), "Serve's client has no get_serve_details any more"


def test_replicas_are_killed_by_these_names() -> None:
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve._private.constants import SERVE_NAMESPACE

    replica = ReplicaID("abc", DeploymentID("Expert3", "app"))
    assert SERVE_NAMESPACE == "serve"
    assert replica.to_full_id_str() == ray_internals.replica_name("app", "Expert3", "abc")


def test_routers_know_their_replicas() -> None:
    from ray.serve._private.request_router.request_router import RequestRouter
    from ray.serve._private.router import AsyncioRouter

    assert "self._asyncio_router" in source("serve", "_private", "router.py"), "routers have no _asyncio_router now"
    assert "self._router" in source("serve", "handle.py"), "handles have no _router any more"
    assert "self._request_router" in inspect.getsource(AsyncioRouter), "routers have no _request_router any more"
    assert isinstance(RequestRouter.curr_replicas, property), "routers have no curr_replicas any more"
    assert callable(serve.handle.DeploymentHandle.running_replicas_populated)
    assert "replica_metadata" in source("serve", "_private", "request_router", "replica_wrapper.py")


def test_a_handle_of_another_build_tells_nothing() -> None:
    class Other:
        _router = object()

    assert ray_internals.routed_replicas(Other()) is None  # type: ignore[arg-type]


def test_replicas_are_asked_by_these_names() -> None:
    replica = source("serve", "_private", "replica.py") + source("serve", "_private", "constants.py")
    for name in ("record_replica_metadata", "record_autoscaling_stats"):
        assert f'"{name}"' in replica, f"Serve does not call {name} any more"
    assert callable(serve.handle.DeploymentHandle.broadcast), "handles have no broadcast any more"


def test_the_key_value_store_has_these_calls() -> None:
    from ray.experimental import internal_kv

    assert callable(internal_kv.internal_kv_get_gcs_client), "Ray has no internal_kv_get_gcs_client any more"
    from ray._raylet import InnerGcsClient

    for name in ("internal_kv_multi_get", "internal_kv_put", "internal_kv_del"):
        assert hasattr(InnerGcsClient, name), f"the key-value store has no {name} any more"


@pytest.mark.parametrize("option", ["_node_ip_address", "_plasma_directory"])
def test_ray_init_takes_private_options(option: str) -> None:
    assert f'"{option}"' in source("_private", "worker.py"), f"ray.init takes no {option} any more"
    assert ray_internals.plasma_directory("/x") == {"_plasma_directory": "/x"}


@pytest.mark.parametrize("name", [*ray_internals.LOCAL_SETTINGS, ray_internals.HAPROXY_SETTING])
def test_ray_reads_these_settings(name: str) -> None:
    if name.startswith("RAY_SERVE_"):
        assert name in source("serve", "_private", "constants.py"), f"Serve does not read {name} any more"
        return
    short = name.removeprefix("RAY_").encode()
    files = [RAY / "_raylet.so", RAY / "_private" / "ray_constants.py", *(RAY / "_common" / "usage").glob("*.py")]
    assert any(short in file.read_bytes() for file in files), f"Ray does not read {name} any more"


def test_ray_says_that_it_was_late() -> None:
    assert ray_internals.LATE_START in source("_private", "node.py")


def test_sessions_lie_where_we_think() -> None:
    temporary = source("_common", "utils.py")
    assert f'"{ray_internals.TEMP_DIR}" in os.environ' in temporary, "Ray takes its temporary directory from elsewhere"
    assert '"TMPDIR" in os.environ' in temporary
    assert "%Y-%m-%d_%H-%M-%S_%f" in source("_private", "node.py"), "sessions have other names now"
    heads = [path.stem for path in (RAY / "dashboard").rglob("*_head.py")]
    assert heads, "the dashboard has no modules any more"
    assert ray_internals.LONGEST_SOCKET.startswith("ray/session_2026-12-31_23-59-59_123456_")
