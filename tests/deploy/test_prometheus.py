"""A real Prometheus scrapes the served model: what our, vLLM's, TGI's and Ray's dashboards ask for is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from dashboard_queries import filled_in, of_ray, ours, tgi, vllm
from debian_prometheus import answer, running_prometheus
from served import Served

BODY: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
REQUEST_ID = "asked-by-a-test"


@pytest.fixture(scope="module")
def prometheus(served_random: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Its HTTP API; it scrapes the gateway each second, and Ray, as cluster/compose/prometheus.yaml has it."""
    import ray

    gateway = urlsplit(served_random.url)
    jobs = [
        {
            "job_name": "moe-ray-gateway",
            "metrics_path": f"{gateway.path}/metrics",
            "static_configs": [{"targets": [gateway.netloc], "labels": {"container": "moe-ray"}}],
        },
        {
            "job_name": "moe-ray",
            "scrape_interval": "5s",  # Ray takes a second and more to tell its metrics on two cores
            "scrape_timeout": "5s",
            "static_configs": [{"targets": [f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"]}],
        },
    ]
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), jobs) as client:
        yield client


def test_every_query_of_the_dashboards_finds_series(served_random: Served, prometheus: httpx.Client) -> None:
    asked = {filled_in(query, "random") for query in (*vllm(), *tgi(), *of_ray(), *ours())}
    assert len(asked) > 120
    deadline = time.monotonic() + 150
    with httpx.Client(base_url=served_random.url, timeout=60, trust_env=False) as client:
        number = 0
        while asked:
            assert time.monotonic() < deadline, f"nothing after {number} rounds for\n" + "\n".join(sorted(asked))
            number += 1
            body = {**BODY, "prompt": list(range(40 + number, 90 + number)), "n": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
            assert client.post("/v1/completions", json={**body, "temperature": -1}).status_code == 400
            asked = {query for query in asked if not answer(prometheus, query)}
    ((_, up),) = [each["value"] for each in answer(prometheus, 'up{job="moe-ray-gateway"}')]
    assert up == "1"


def test_both_ways_tell_the_same(served_random: Served, prometheus: httpx.Client) -> None:
    """What the only gateway tells itself and what Ray tells of it are the same sequences."""
    end = time.monotonic() + 40
    while True:
        pairs = []
        for name in ("time_to_first_token_seconds_count", "request_generation_tokens_sum", "num_requests_running"):
            own = answer(prometheus, f'sum(vllm:{name}{{model_name="random"}})')
            through_ray = answer(prometheus, f'sum(ray_vllm_{name}{{model_name="random"}})')
            pairs.append([each[0]["value"][1] for each in (own, through_ray) if each])
        if all(len(pair) == 2 and pair[0] == pair[1] for pair in pairs):
            return
        assert time.monotonic() < end, pairs
        time.sleep(1)


def test_serve_tells_the_id_of_a_request_once(served_random: Served) -> None:
    with httpx.Client(base_url=served_random.url, timeout=60, trust_env=False) as client:
        for path, status in (("/v1/models", 200), ("/nowhere", 404)):
            response = client.get(path, headers={"X-Request-Id": REQUEST_ID})
            assert response.status_code == status
            assert response.headers.get_list("x-request-id") == [REQUEST_ID]
        assert len(client.get("/health").headers.get_list("x-request-id")) == 1
