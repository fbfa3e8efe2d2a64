"""A real Prometheus scrapes Ray: what our dashboards, Ray's own one and our alerts ask for is there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import httpx
from dashboard_queries import alerts, filled_in, of_ray, ours, without_thresholds
from debian_prometheus import answer, running_prometheus
from served import Served, eventually

from moe_ray.core import EngineStats, TierStats
from moe_ray.deploy.metrics import ENGINE_GAUGES, TrunkMetrics
from moe_ray.experts.client.accounting import Counters

TIERS: Final = {each.name: 1 for each in fields(TierStats)}
RARE: Final = EngineStats(preemptions=1, drafts=1, draft_tokens=1, accepted_draft_tokens=1, degraded_tokens=1, **TIERS)
RARE_CALLS: Final = Counters(splits=1, retries=1, hedges=1, hedge_wins=1, cancelled=1, quarantines=1)
BODY: Final[dict[str, Any]] = {"prompt": list(range(5, 105)), "max_tokens": 4, "ignore_eos": True, "temperature": 0}


def refuse_and_answer(served: Served) -> None:
    """Requests that end well, the second of them out of the prefix cache, and one that does not."""
    with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
        for _ in range(2):
            assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.post("/v1/completions", json={**BODY, "temperature": -1}).status_code == 400


def tell_what_is_rare() -> None:
    """Ray exports no counter that is still 0: what does not happen here has been told once, of another trunk."""
    TrunkMetrics("beside", lambda: RARE, RARE_CALLS).report()


def questions(application: str) -> set[str]:
    """All queries, without their thresholds; for what does not happen here they ask for its like that does."""
    for_like = {'error_code=~"5.."': 'error_code="400"', 'error_code="429"': 'error_code="400"'}
    for_like['finished_reason="error"'] = 'finished_reason="length"'
    # The trunk beside has gauges, too.
    asked = {f'ray_moe_ray_trunk_{name}{{trunk!="beside"}}' for name, _ in ENGINE_GAUGES.values()}
    for query in (*ours(), *alerts(), *of_ray()):
        for here, there in for_like.items():
            query = query.replace(here, there)
        asked.add(filled_in(without_thresholds(query), application))
    return asked


def test_every_query_and_every_alert_finds_series(served_demo: Served, tmp_path: Path) -> None:
    import ray

    refuse_and_answer(served_demo)
    tell_what_is_rare()
    asked = questions(served_demo.app_name)
    assert len(asked) > 100
    target = f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
    # Ray takes a second and more of a core to tell its metrics.
    job = {
        "job_name": "ray",
        "scrape_interval": "5s",
        "scrape_timeout": "5s",
        "static_configs": [{"targets": [target]}],
    }
    with running_prometheus(tmp_path, [job]) as prometheus:
        unanswered = set(asked)

        def all_answered() -> bool:
            for query in list(unanswered):
                if not answer(prometheus, query):
                    return False
                unanswered.remove(query)
            return True

        try:
            eventually(all_answered, timeout_s=60, every_s=1)
        except AssertionError:
            empty = sorted(query for query in unanswered if not answer(prometheus, query))
            raise AssertionError("no series for\n" + "\n".join(empty)) from None
