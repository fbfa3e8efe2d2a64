"""Writes the dashboards beside it: `python build.py`. What they show is in `DASHBOARDS`, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Matches also where there is no such label, because the variable's "All" is `.*`.
HERE = 'namespace=~"$namespace"'
APP = f'application="moe-ray", {HERE}'
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


@dataclass(frozen=True)
class Panel:
    """A graph, or with `kind` another panel: (expression, legend) pairs. Units are Grafana's names."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    says: str = ""
    kind: str = "timeseries"
    most: float | None = None
    width: int = WIDTH


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", labels: str = HERE) -> str:
    """A counter's rate, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{RATE}))"


def busy(extra: str = "") -> str:
    return f"avg by (deployment) (ray_moe_ray_expert_busy_fraction{{{HERE}{extra}}})"


def latency(quantile: float) -> tuple[str, str]:
    buckets = rate("ray_serve_http_request_latency_ms_bucket", "le", APP)
    return f"histogram_quantile({quantile:g}, {buckets})", f"p{quantile * 100:g}"


def seconds(histogram: str) -> tuple[tuple[str, str], ...]:
    buckets = rate(f"{histogram}_bucket", "le")
    return tuple((f"histogram_quantile({q:g}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))


def mean(histogram: str) -> str:
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def healthy(deployments: str) -> str:
    return f'sum(ray_serve_deployment_replica_healthy{{{APP}, deployment=~"{deployments}"}})'


ONE = ', deployment=~"$deployment"'
DASHBOARDS: dict[str, tuple[str, tuple[Row, ...]]] = {
    "moe-ray": (
        "moe_ray",
        (
            Row(
                "Now",
                (
                    Panel("Gateways", ((healthy("Gateway"), ""),), kind="stat", width=4),
                    Panel("Trunks", ((healthy("Trunk"), ""),), kind="stat", width=4),
                    Panel("Expert replicas", ((healthy("Experts?[0-9].*|Spare.*"), ""),), kind="stat", width=4),
                    Panel(
                        "Tokens per second",
                        ((rate("ray_moe_ray_trunk_generated_tokens_total"), ""),),
                        kind="stat",
                        width=4,
                    ),
                    Panel(
                        "Imbalance",
                        ((f"max({busy()}) / avg({busy()})", ""),),
                        says="Busiest expert over the mean: 1 is balanced.",
                        kind="stat",
                        width=4,
                    ),
                    Panel(
                        "KV cache held",
                        (
                            (
                                f"sum(ray_moe_ray_trunk_kv_blocks_used{{{HERE}}})"
                                f" / sum(ray_moe_ray_trunk_kv_blocks{{{HERE}}})",
                                "",
                            ),
                        ),
                        "percentunit",
                        kind="stat",
                        width=4,
                    ),
                ),
            ),
            Row(
                "Requests",
                (
                    Panel(
                        "HTTP requests",
                        (
                            (
                                rate("ray_serve_num_http_requests_total", "route, status_code", APP),
                                "{{route}} {{status_code}}",
                            ),
                        ),
                        "reqps",
                    ),
                    Panel(
                        "HTTP errors",
                        ((rate("ray_serve_num_http_error_requests_total", "error_code", APP), "{{error_code}}"),),
                        "reqps",
                    ),
                    Panel(
                        "Time of a request",
                        (latency(0.5), latency(0.9), latency(0.99)),
                        "ms",
                        "Until the last token: long answers take long.",
                    ),
                    Panel(
                        "Time to the first token",
                        seconds("ray_vllm_time_to_first_token_seconds"),
                        "s",
                        "From a request's arrival at its gateway.",
                    ),
                    Panel(
                        "Time per further token",
                        seconds("ray_vllm_request_time_per_output_token_seconds"),
                        "s",
                        "Mean of each sequence.",
                    ),
                    Panel("Time of a sequence", seconds("ray_vllm_e2e_request_latency_seconds"), "s"),
                    Panel(
                        "Where the time goes",
                        (
                            (mean("ray_vllm_request_queue_time_seconds"), "waits in the trunk"),
                            (mean("ray_vllm_request_prefill_time_seconds"), "prefill"),
                            (mean("ray_vllm_request_decode_time_seconds"), "decode"),
                        ),
                        "s",
                        "Means of sequences.",
                    ),
                    Panel(
                        "Length of a sequence",
                        (
                            (mean("ray_vllm_request_prompt_tokens"), "prompt"),
                            (mean("ray_vllm_request_generation_tokens"), "generated"),
                        ),
                        says="Means, in tokens.",
                    ),
                    Panel(
                        "Sequences by their end",
                        ((rate("ray_vllm_request_success_total", "finished_reason"), "{{finished_reason}}"),),
                        says="Per second. abort: the client went away.",
                    ),
                ),
            ),
            Row(
                "Trunk",
                (
                    Panel(
                        "Tokens per second",
                        (
                            (rate("ray_moe_ray_trunk_generated_tokens_total"), "generated"),
                            (rate("ray_moe_ray_trunk_prompt_tokens_total"), "prompt, computed"),
                            (rate("ray_moe_ray_trunk_prefix_hit_tokens_total"), "prompt, from the prefix cache"),
                        ),
                    ),
                    Panel(
                        "Sequences",
                        (
                            (f"sum by (trunk) (ray_moe_ray_trunk_running{{{HERE}}})", "running {{trunk}}"),
                            (f"sum by (trunk) (ray_moe_ray_trunk_waiting{{{HERE}}})", "waiting {{trunk}}"),
                            (f"sum by (trunk) (ray_moe_ray_trunk_adapters{{{HERE}}})", "adapters held {{trunk}}"),
                        ),
                    ),
                    Panel(
                        "KV cache held by sequences",
                        (
                            (
                                f"sum by (trunk) (ray_moe_ray_trunk_kv_blocks_used{{{HERE}}})"
                                f" / sum by (trunk) (ray_moe_ray_trunk_kv_blocks{{{HERE}}})",
                                "{{trunk}}",
                            ),
                        ),
                        "percentunit",
                        most=1,
                    ),
                    Panel(
                        "Steps per second",
                        ((rate("ray_moe_ray_trunk_steps_total", "trunk"), "{{trunk}}"),),
                        says="Batches computed. One token of each running sequence per step, or more with speculation.",
                    ),
                    Panel(
                        "Guessed tokens",
                        (
                            (rate("ray_moe_ray_trunk_drafts_total"), "runs"),
                            (rate("ray_moe_ray_trunk_draft_tokens_total"), "verified"),
                            (rate("ray_moe_ray_trunk_accepted_draft_tokens_total"), "came true"),
                        ),
                        says="With engine.speculative.",
                    ),
                    Panel(
                        "Prefix cache hits",
                        (
                            (
                                rate("ray_moe_ray_trunk_prefix_hit_tokens_total", "trunk")
                                + " / "
                                + rate("ray_moe_ray_trunk_prefix_query_tokens_total", "trunk"),
                                "{{trunk}}",
                            ),
                        ),
                        "percentunit",
                        "Share of the prompts' tokens.",
                        most=1,
                    ),
                    Panel(
                        "Tokens from below the KV cache",
                        (
                            (rate("ray_moe_ray_trunk_swap_hit_tokens_total"), "from host memory"),
                            (rate("ray_moe_ray_trunk_disk_hit_tokens_total"), "from disk"),
                            (rate("ray_moe_ray_trunk_tier_declined_tokens_total"), "computed, because that is faster"),
                        ),
                        says="Per second, with engine.kv_swap_gib or engine.kv_disk_dir.",
                    ),
                    Panel(
                        "Bytes below the KV cache",
                        (
                            (f"sum by (trunk) (ray_moe_ray_trunk_swap_bytes{{{HERE}}})", "host memory {{trunk}}"),
                            (f"max by (trunk) (ray_moe_ray_trunk_disk_bytes{{{HERE}}})", "disk, as seen by {{trunk}}"),
                        ),
                        "bytes",
                        says="Trunks may share the directory.",
                    ),
                    Panel(
                        "KV bytes per second",
                        (
                            (rate("ray_moe_ray_trunk_swap_stored_bytes_total"), "to host memory"),
                            (rate("ray_moe_ray_trunk_swap_loaded_bytes_total"), "from host memory"),
                            (rate("ray_moe_ray_trunk_disk_written_bytes_total"), "to disk"),
                            (rate("ray_moe_ray_trunk_disk_loaded_bytes_total"), "from disk"),
                        ),
                        "Bps",
                    ),
                    Panel(
                        "Time and faults below the KV cache",
                        (
                            (rate("ray_moe_ray_trunk_swap_load_seconds_total"), "seconds of copies in steps"),
                            (rate("ray_moe_ray_trunk_disk_read_seconds_total"), "seconds of reading, beside steps"),
                            (rate("ray_moe_ray_trunk_swap_evicted_blocks_total"), "blocks given up by host memory"),
                            (rate("ray_moe_ray_trunk_disk_removed_files_total"), "blocks given up by the disk"),
                            (rate("ray_moe_ray_trunk_disk_dropped_blocks_total"), "blocks not written, queue full"),
                            (rate("ray_moe_ray_trunk_disk_damaged_files_total"), "damaged files"),
                            (rate("ray_moe_ray_trunk_disk_failures_total"), "reads and writes refused"),
                        ),
                        says="Per second.",
                    ),
                    Panel(
                        "Degraded tokens, preemptions",
                        (
                            (rate("ray_moe_ray_trunk_degraded_tokens_total"), "tokens without one of their experts"),
                            (rate("ray_moe_ray_trunk_preemptions_total"), "sequences preempted"),
                        ),
                    ),
                ),
            ),
            Row(
                "Calls to experts",
                (
                    Panel(
                        "Calls per second",
                        (
                            (rate("ray_moe_ray_pool_calls_total"), "calls"),
                            (rate("ray_moe_ray_pool_splits_total"), "batches shared among replicas"),
                        ),
                    ),
                    Panel(
                        "Late calls",
                        (
                            (rate("ray_moe_ray_pool_hedges_total"), "sent to another replica too"),
                            (rate("ray_moe_ray_pool_hedge_wins_total"), "answered by it first"),
                            (rate("ray_moe_ray_pool_cancelled_total"), "taken back"),
                        ),
                    ),
                    Panel(
                        "Failed calls",
                        (
                            (rate("ray_moe_ray_pool_retries_total"), "sent again"),
                            (rate("ray_moe_ray_pool_quarantines_total"), "replicas set aside"),
                        ),
                    ),
                ),
            ),
            Row(
                "Replicas",
                (
                    Panel(
                        "Healthy replicas",
                        ((f"sum by (deployment) (ray_serve_deployment_replica_healthy{{{APP}}})", "{{deployment}}"),),
                    ),
                    Panel(
                        "New replicas in 15 minutes",
                        (
                            (
                                f"count by (deployment) (ray_serve_deployment_replica_healthy{{{APP}}}"
                                f" unless ray_serve_deployment_replica_healthy{{{APP}}} offset 15m)",
                                "{{deployment}}",
                            ),
                        ),
                        says="Also those that replaced lost ones.",
                    ),
                    Panel(
                        "Time until a replica is ready, p90",
                        (
                            (
                                "histogram_quantile(0.9, "
                                + rate("ray_serve_replica_startup_latency_ms_bucket", "le, deployment", APP)
                                + ")",
                                "{{deployment}}",
                            ),
                        ),
                        "ms",
                    ),
                ),
            ),
        ),
    ),
    "moe-ray-experts": (
        "moe_ray experts",
        (
            Row(
                "Load",
                (
                    Panel(
                        "Busy",
                        ((busy(ONE), "{{deployment}}"),),
                        "percentunit",
                        "Share of the last 10 s that replicas computed, mean of each expert.",
                        most=1,
                        width=12,
                    ),
                    Panel(
                        "Rows per second",
                        ((rate("ray_moe_ray_expert_rows_total", "expert"), "expert {{expert}}"),),
                        says="Token rows of all layers; a token makes num_experts_per_tok rows per layer.",
                        width=12,
                    ),
                    Panel(
                        "Wait of a call",
                        ((f"avg by (deployment) (ray_moe_ray_expert_queue_wait_ms{{{HERE}{ONE}}})", "{{deployment}}"),),
                        "ms",
                    ),
                    Panel(
                        "Rows per call",
                        ((f"avg by (deployment) (ray_moe_ray_expert_rows_per_call{{{HERE}{ONE}}})", "{{deployment}}"),),
                    ),
                    Panel(
                        "Rows waiting or being computed",
                        ((f"sum by (deployment) (ray_moe_ray_expert_queued_rows{{{HERE}{ONE}}})", "{{deployment}}"),),
                    ),
                ),
            ),
            Row(
                "Where",
                (
                    Panel(
                        "Busy, by replica",
                        ((f"ray_moe_ray_expert_busy_fraction{{{HERE}{ONE}}}", "{{deployment}} {{replica}}"),),
                        "percentunit",
                        most=1,
                        width=12,
                    ),
                    Panel(
                        "Hottest layers",
                        (
                            (
                                f"topk(20, {rate('ray_moe_ray_expert_rows_total', 'expert, layer')})",
                                "expert {{expert}} layer {{layer}}",
                            ),
                        ),
                        says="Rows per second; what experts.spares are for.",
                        width=12,
                    ),
                ),
            ),
            Row(
                "Nodes",
                (
                    Panel("CPU", ((f"ray_node_cpu_utilization{{{HERE}}}", "{{ip}}"),), "percent"),
                    Panel("GPU", ((f"ray_node_gpus_utilization{{{HERE}}}", "{{ip}} {{GpuIndex}}"),), "percent"),
                    Panel("GPU memory", ((f"ray_node_gram_used{{{HERE}}}", "{{ip}} {{GpuIndex}}"),), "decmbytes"),
                ),
            ),
        ),
    ),
}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    height = HEIGHT if panel.kind == "timeseries" else 4
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, **({} if panel.most is None else {"max": panel.most})},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


def dashboard_json(uid: str, title: str, rows: tuple[Row, ...]) -> dict[str, Any]:
    """Grafana's model of a dashboard."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + panels[-1]["gridPos"]["h"]
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            x += panel.width
        y += panels[-1]["gridPos"]["h"]

    def variable(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "query",
            "label": name.capitalize(),
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": f"label_values(ray_moe_ray_expert_busy_fraction, {name})",
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }

    names = ["namespace"] + (["deployment"] if uid.endswith("experts") else [])
    return {
        "uid": uid,
        "title": title,
        "tags": ["moe-ray"],
        "editable": True,
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {"type": "dashboards", "tags": ["moe-ray"], "title": "moe_ray", "asDropdown": True, "keepTime": True}
        ],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                *(variable(name) for name in names),
            ]
        },
        "panels": panels,
    }


def texts() -> dict[str, str]:
    """File name → content of every dashboard."""
    return {
        f"{uid}.json": json.dumps(dashboard_json(uid, title, rows), indent=1) + "\n"
        for uid, (title, rows) in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
