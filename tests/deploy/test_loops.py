"""Loops in the background survive what they call: the fault is logged, and the next turn is made."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from served import eventually

from moe_ray.core import ReplicaInfo
from moe_ray.deploy.discovery import from_metadata
from moe_ray.deploy.metrics import Reporter, surviving
from moe_ray.deploy.peers import wait_for_successor
from moe_ray.deploy.policies import ExpertPolicy, TrunkPolicy


def test_the_reporter_of_metrics(caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []

    def report() -> None:
        turns.append(len(turns))
        if len(turns) < 3:
            raise ValueError("this metric is wrong")

    reporter = Reporter(report, period_s=0.01)
    try:
        eventually(lambda: len(turns) > 4)
    finally:
        reporter.close()
    assert caplog.text.count("metrics could not be reported") == 2
    assert "this metric is wrong" in caplog.text
    assert not any(thread.name == "metrics" and thread.is_alive() for thread in threading.enumerate())


def test_what_a_sampler_calls_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    def report(what: str, *, times: int) -> None:
        raise KeyError(what * times)

    surviving(report)("x", times=3)
    assert "xxx" in caplog.text


class Context:
    """As Serve's controller gives it to a policy; its reports cannot be read."""

    target_num_replicas = 3
    app_name = "an application of this test"
    current_time = time.time()

    @property
    def raw_metrics(self) -> dict[str, object]:
        raise RuntimeError("no reports")


@pytest.mark.parametrize("policy", [ExpertPolicy(0, 1, 5, {}), TrunkPolicy(1, 5, {})])
def test_policies(policy: ExpertPolicy | TrunkPolicy, caplog: pytest.LogCaptureFixture) -> None:
    assert policy(Context()) == (3, {})  # type: ignore[arg-type]
    assert "the number of replicas stays 3" in caplog.text


def test_the_wait_for_a_successor(caplog: pytest.LogCaptureFixture) -> None:
    turns = 0

    def find() -> list[ReplicaInfo]:
        nonlocal turns
        turns += 1
        if turns == 1:
            raise RuntimeError("an answer that nothing expects")
        return [ReplicaInfo("another", "node", 1, frozenset({(0, 0)}), 8, "float32", {})]

    wait_for_successor(find, lambda: False, "me", 10.0)
    assert turns == 2
    assert "an answer that nothing expects" in caplog.text


def test_a_replica_of_another_version(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert from_metadata({"endpoint": {"keys": [[0, 1]], "a field of tomorrow": 1}}) is None
        assert from_metadata({"endpoint": {}}) is None
    assert caplog.text.count("in a form that this version does not know") == 2
    assert from_metadata({}) is None
