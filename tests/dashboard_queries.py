"""What dashboards ask Prometheus for: names and expressions as data, with `$`-variables as Grafana has them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import yaml

CLUSTER: Final = Path(__file__).parents[1] / "cluster"

# examples/observability/prometheus_grafana/grafana.json of vLLM
VLLM_QUANTILES: Final = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
VLLM_RATES: Final = (
    *("prompt_tokens_total", "generation_tokens_total", "request_queue_time_seconds_sum"),
    *("request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"),
    "request_max_num_generation_tokens_sum",
)
VLLM_GAUGES: Final = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
VLLM_HEAT: Final = ("request_prompt_tokens", "request_generation_tokens")

# assets/tgi_grafana.json of TGI
TGI_QUANTILES: Final = (
    *("request_queue_duration", "request_input_length", "request_generated_tokens", "request_skipped_tokens"),
    *("request_mean_time_per_token_duration", "request_duration"),
)
TGI_BY_METHOD: Final = (
    *(("inference", "prefill"), ("inference", "decode"), ("forward", "decode"), ("decode", "decode")),
    *(("filter", "decode"), ("concat", "decode")),
)
TGI_SUMS: Final = (
    'sum(increase(tgi_request_success{container="$service"}[1m]))',
    'sum(increase(tgi_request_failure{container="$service"}[1m])) by (err)',
    'sum(increase(tgi_request_mean_time_per_token_duration_bucket{container="$service"}[5m])) by (le)',
    'sum(increase(tgi_batch_concat{container="$service"}[1m])) by (reason)',
    'count(tgi_request_count{container="$service"})',
    'sum(tgi_queue_size{container="$service"})',
    'avg(tgi_batch_current_max_tokens{container="$service"})',
    'avg(tgi_batch_current_size{container="$service"})',
    'sum((rate(tgi_request_generated_tokens_sum{container="$service"}[10m])'
    ' / rate(tgi_request_generated_tokens_count{container="$service"}[10m]))>0)',
    '(histogram_quantile(0.5, sum by (le) (rate(tgi_request_queue_duration_bucket{container="$service"}[10m])))'
    " * 1000) > 0",
)

OF_OTHER_PARTS: Final = re.compile(r"nixl|kv_offload|external_prefix|num_requests_swapped")
"""What vLLM has and we do not: transfers between engines, offloaded caches, a swap."""
OF_SERVE: Final = "ray_serve_deployment_request_counter_total"
OF_CARDS: Final = re.compile(r"gpus_utilization|gram_used")
THRESHOLD: Final = re.compile(r"\s*(?:(?:[<>]=?|==) [\d.]+|or on \(\) vector\(0\))")


def vllm() -> Iterator[str]:
    """The queries of vLLM's own dashboard."""
    of = '{model_name="$model_name"}'
    for name in VLLM_QUANTILES:
        for quantile in ("0.99", "0.95", "0.9", "0.5"):
            yield f"histogram_quantile({quantile}, sum by(le) (rate(vllm:{name}_bucket{of}[$__rate_interval])))"
        yield f"rate(vllm:{name}_sum{of}[$__rate_interval]) / rate(vllm:{name}_count{of}[$__rate_interval])"
    for name in VLLM_RATES:
        yield f"rate(vllm:{name}{of}[$__rate_interval])"
    for name in VLLM_GAUGES:
        yield f"vllm:{name}{of}"
    for name in VLLM_HEAT:
        yield f"sum by(le) (increase(vllm:{name}_bucket{of}[$__rate_interval]))"
    yield f"sum by(finished_reason) (increase(vllm:request_success_total{of}[$__rate_interval]))"


def tgi() -> Iterator[str]:
    """The queries of TGI's own dashboard."""
    for name in TGI_QUANTILES:
        for quantile in ("0.5", "0.9", "0.99"):
            yield (
                f'histogram_quantile({quantile}, sum by (le) (rate(tgi_{name}_bucket{{container="$service"}}[10m])))'
            )
    for stage, method in TGI_BY_METHOD:
        of = f'tgi_batch_{stage}_duration_bucket{{method="{method}", container="$service"}}'
        for quantile in ("0.5", "0.9", "0.99"):
            yield f"histogram_quantile({quantile}, sum by (le) (rate({of}[10m])))"
        yield f"sum(increase({of}[5m])) by (le)"
    yield from TGI_SUMS


def of_ray() -> Iterator[str]:
    """The queries of the dashboard for language models that the installed Ray has."""
    from ray.dashboard.modules.metrics.dashboards.serve_llm_dashboard_panels import serve_llm_dashboard_config

    for row in serve_llm_dashboard_config.rows:
        for panel in row.panels:
            for target in panel.targets:
                if OF_OTHER_PARTS.search(target.expr):
                    continue
                # Serve's own series have a model's name in Ray's LLM server only: as with "All" chosen.
                query = target.expr.replace(f'{OF_SERVE}{{{{model_name=~"$vllm_model_name", ', f"{OF_SERVE}{{{{")
                # A whole day in steps of a minute would have to have one behind it.
                yield query.format(global_filters="").replace("[24h:1m]", "[1m:1s]")


def ours() -> Iterator[str]:
    """The queries of the dashboards in cluster/grafana, but for those of cards."""
    for path in sorted((CLUSTER / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                if not OF_CARDS.search(target["expr"]):
                    yield target["expr"]


def alerts() -> Iterator[str]:
    """The expressions of the alerts in cluster/prometheus."""
    for group in yaml.safe_load((CLUSTER / "prometheus" / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def without_thresholds(query: str) -> str:
    """What a query compares with numbers, whatever it is now."""
    return THRESHOLD.sub("", query)


def filled_in(query: str, application: str) -> str:
    """A query as Grafana asks it, for a model that is served under the name of its application."""
    known = {
        "__rate_interval": "1m",
        "interval": "1m",
        "model_name": application,
        "vllm_model_name": application,
        "service": "moe-ray",
    }
    query = query.replace('application="moe-ray"', f'application="{application}"')
    return re.sub(r"\$(\w+)", lambda found: known.get(found[1], ".*"), query)
