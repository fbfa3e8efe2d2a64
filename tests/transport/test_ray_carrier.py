"""What only the Ray carrier has: a real Serve replica found by its name, actors without a name, Ray's own errors."""

from __future__ import annotations

import os
import signal
import time
import uuid

import echo_expert as echo
import pytest
import torch

from moe_ray.core import ExpertCall
from moe_ray.errors import ConfigError, LinkBroken
from moe_ray.transport import connect
from moe_ray.transport.base import LinkOptions

pytestmark = pytest.mark.usefixtures("ray_cluster")
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _pickle_by_value() -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(echo)  # workers do not have this directory on their path


def make_call(expert: int = echo.ECHO, layer: int = 0) -> ExpertCall:
    return ExpertCall(layer, expert, torch.randn(2, 3), torch.rand(2))


def test_a_serve_replica(request: pytest.FixtureRequest) -> None:
    from ray import serve

    deployment = serve.deployment(echo.EchoActor).options(
        name="Expert0", num_replicas=2, ray_actor_options={"num_cpus": 0}
    )
    handle = serve.run(deployment.bind(), name="transport-test", route_prefix=None)
    request.addfinalizer(lambda: serve.delete("transport-test"))
    endpoints: dict[str, int] = {}
    deadline = time.monotonic() + 20
    while len(endpoints) < 2 and time.monotonic() < deadline:  # the router picks; ask until both have answered
        address, pid = handle.endpoint.remote().result(timeout_s=20)
        endpoints[address] = pid
    assert len(endpoints) == 2
    assert all(address.startswith("serve/SERVE_REPLICA::transport-test#Expert0#") for address in endpoints)
    links = {address: connect("ray", echo.info({"ray": address})) for address in endpoints}
    calls = {address: make_call() for address in endpoints}
    pending = {address: link.send(calls[address]) for address, link in links.items()}
    for address, reply in pending.items():
        assert torch.equal(reply.result(WAIT_S).rows, echo.weighted(calls[address]))
    assert handle.endpoint.remote().result(timeout_s=20)[0] in endpoints  # Serve's own way in still works

    victim, survivor = endpoints
    lost = links[victim].send(make_call(echo.SLOW, layer=3000))
    time.sleep(0.1)
    os.kill(endpoints[victim], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="echo-1"):
        lost.result(WAIT_S)
    assert time.monotonic() - started < 2.5
    assert links[victim].broken
    links[survivor].send(make_call()).result(WAIT_S)
    assert not links[survivor].broken


def test_a_busy_actor_is_given_up_and_a_closed_one_breaks_its_links() -> None:
    import ray

    name = f"echo-{uuid.uuid4().hex}"
    actor = ray.remote(echo.EchoActor).options(name=name, num_cpus=0).remote()  # in the job's own namespace
    address, _ = ray.get(actor.endpoint.remote(), timeout=30)
    assert address == f"{ray.get_runtime_context().namespace}/{name}"
    info = echo.info({"ray": address})
    link = connect("ray", info)
    link.send(make_call()).result(WAIT_S)
    link.send(make_call(echo.SLOW, layer=1200))
    started = time.monotonic()
    with pytest.raises(LinkBroken, match=r"no answer within 0\.2 s"):
        connect("ray", info, LinkOptions(connect_timeout_s=0.2))
    assert time.monotonic() - started < 1.0
    ray.get(actor.close.remote(), timeout=30)
    with pytest.raises(LinkBroken, match="the replica closed"):
        link.send(make_call()).result(WAIT_S)
    assert link.broken
    with pytest.raises(LinkBroken, match="the actor serves no expert"):
        connect("ray", info)
    ray.kill(actor)


def test_an_actor_without_a_name_is_a_config_error() -> None:
    import ray

    from moe_ray.transport.ray import RayExpertServer

    class Nameless:
        def attempt(self) -> str:
            try:
                RayExpertServer(echo.behave)
            except ConfigError as error:
                return str(error)
            return ""

    actor = ray.remote(Nameless).options(num_cpus=0).remote()
    assert "needs a named Ray actor" in ray.get(actor.attempt.remote(), timeout=30)
    with pytest.raises(ConfigError, match="needs a named Ray actor"):
        RayExpertServer(echo.behave)
    ray.kill(actor)
