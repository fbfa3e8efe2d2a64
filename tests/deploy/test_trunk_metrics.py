"""What Prometheus sees of a trunk is what its status says, and every counter there is has a help text."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import fields
from typing import Any

import httpx
from served import Served

from moe_ray.core import EngineStats
from moe_ray.deploy.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, POOL_COUNTERS, Reporter
from moe_ray.experts.client.accounting import Counters

SERIES = re.compile(r"ray_moe_ray_(trunk|pool)_(\w+)\{(.*)\} (\S+)")
TAG = re.compile(r'(\w+)="([^"]*)"')


def test_no_counter_is_forgotten() -> None:
    assert POOL_COUNTERS.keys() == {field.name for field in fields(Counters)}
    assert not ENGINE_COUNTERS.keys() & ENGINE_GAUGES.keys()
    assert ENGINE_COUNTERS.keys() | ENGINE_GAUGES.keys() == {field.name for field in fields(EngineStats)}


def test_a_reporter_reports_now_and_then_and_a_last_time() -> None:
    reports, thrice = list[float](), threading.Event()

    def report() -> None:
        reports.append(time.monotonic())
        if len(reports) == 3:
            thrice.set()

    reporter = Reporter(report, period_s=0.02)
    assert thrice.wait(10)
    reporter.close()
    count = len(reports)
    time.sleep(0.1)
    assert len(reports) == count, "not after it was closed"
    idle = list[int]()
    reporter = Reporter(lambda: idle.append(1), period_s=100)
    reporter.close()
    reporter.close()
    assert idle == [1]


def trunk_status(served: Served) -> dict[str, Any]:
    from ray import serve

    (status,) = serve.get_deployment_handle("Trunk", served.app_name).broadcast("status").results(timeout_s=10)
    return status


def exported(replica_id: str) -> dict[tuple[str, str], float]:
    """(trunk or pool, name) → value, of one trunk."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    found = [SERIES.fullmatch(line) for line in httpx.get(url, timeout=10, trust_env=False).text.splitlines()]
    series = [(m[1], m[2], dict(TAG.findall(m[3])), float(m[4])) for m in found if m is not None]
    return {(room, name): value for room, name, tags, value in series if tags["trunk"] == replica_id}


def test_prometheus_sees_what_the_status_says(served_random: Served) -> None:
    body = {"prompt": list(range(50, 90)), "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    for _ in range(2):  # the second finds the first one's prompt in the prefix cache
        done = httpx.post(f"{served_random.url}/v1/completions", json=body, timeout=120, trust_env=False)
        assert done.status_code == 200
    status = trunk_status(served_random)
    assert status["prefix_hit_tokens"] > 0
    expected = {("pool", f"{name}_total"): status["expert_calls"][name] for name in POOL_COUNTERS}
    expected |= {("trunk", f"{name}_total"): status[name] for name in ENGINE_COUNTERS}
    expected = {name: value for name, value in expected.items() if value}
    expected |= {("trunk", name): status[field] for field, (name, _) in ENGINE_GAUGES.items()}
    expected["trunk", "kv_blocks_used"] = status["kv_blocks_total"] - status["kv_blocks_free"]
    deadline = time.monotonic() + 60
    while (found := exported(status["replica_id"])) != expected:
        assert time.monotonic() < deadline, (found, expected)
        time.sleep(0.5)
    assert expected["trunk", "generated_tokens_total"] >= 40
    assert expected["pool", "calls_total"] >= 40
