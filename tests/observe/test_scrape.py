"""A real Prometheus scrapes a gateway: every query of vLLM's and of TGI's own dashboards finds series."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from dashboard_queries import filled_in, tgi, vllm
from debian_prometheus import answer, running_prometheus
from in_process import Trunk, served
from on_a_loop import on_a_loop

ASK: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def watch(gateway: str, directory: Path) -> set[str]:
    """Ask a gateway and a Prometheus that scrapes it, in turns; the queries that found nothing in the end."""
    target = {"targets": [gateway], "labels": {"container": "moe-ray"}}
    unanswered = {filled_in(query, "random") for query in (*vllm(), *tgi())}
    assert len(unanswered) > 70
    with (
        running_prometheus(directory, [{"job_name": "gateway", "static_configs": [target]}]) as prometheus,
        httpx.Client(base_url=f"http://{gateway}", timeout=60, trust_env=False) as client,
    ):
        deadline = time.monotonic() + 60
        while unanswered and time.monotonic() < deadline:
            prompt = [5 + int(time.monotonic()) % 400] * 20
            assert client.post("/v1/completions", json={**ASK, "prompt": prompt}).status_code == 200
            assert client.post("/v1/completions", json={**ASK, "temperature": -1}).status_code == 400
            unanswered = {query for query in unanswered if not answer(prometheus, query)}
    return unanswered


@pytest.mark.slow
@on_a_loop
async def test_every_query_of_vllm_and_tgi_finds_series(trunk: Trunk, readable_model: Path, tmp_path: Path) -> None:
    async with served(readable_model, [trunk.info]) as client:
        assert not await asyncio.to_thread(watch, client.base_url.netloc.decode(), tmp_path)
