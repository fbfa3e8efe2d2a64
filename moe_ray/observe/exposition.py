"""The text of GET /metrics, for Prometheus: what was counted, under the names of `families`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as PLAIN_TEXT
from prometheus_client.exposition import generate_latest as plain_text
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.registry import Collector

from moe_ray.engine.step_times import KINDS, SEQUENCE_BOUNDS, STAGES, TOKEN_BOUNDS
from moe_ray.histogram import STEP_BOUNDS, Histogram
from moe_ray.observe import families
from moe_ray.observe.request_counts import RequestCounts, summed
from moe_ray.observe.trunk_told import TrunkTold
from moe_ray.pb import moe_ray_pb2 as pb

ENGINE = ("model_name", "engine")


OPEN_METRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(frozen=True, slots=True)
class ModelTold:
    """What there is to tell of one served model."""

    name: str
    counts: RequestCounts
    trunks: Sequence[TrunkTold]


def expose(accept: str, models: Sequence[ModelTold], experts: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the text and its content type: OpenMetrics where `accept` (an HTTP header) asks for it.

    `experts`: what GET /experts answers. Nothing here can fail for want of a part of a model. A series without a
    model's name is of all models.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_All([*_requests(models), *_trunks(models), *_experts(experts)]))
    # Not `choose_encoder`: for a Prometheus before 3.0 it writes `vllm_` for `vllm:`, which that knows very well.
    if "application/openmetrics-text" in accept:
        return open_metrics(registry, ALLOWUTF8), OPEN_METRICS  # type: ignore[no-untyped-call]
    return plain_text(registry), PLAIN_TEXT


class _All(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _requests(models: Sequence[ModelTold]) -> Iterator[Metric]:
    counts = summed([model.counts for model in models])
    for attribute, told in families.VLLM_HISTOGRAMS.items():
        family = HistogramMetricFamily(*told, labels=["model_name"])
        for model in models:
            _add(family, [model.name], getattr(model.counts, attribute))
        yield family
    for attribute, told in families.TGI_HISTOGRAMS.items():
        family = HistogramMetricFamily(*told)
        _add(family, [], getattr(counts, attribute))
        yield family
    for attribute, told in families.VLLM_COUNTERS.items():
        yield _counter(told, ["model_name"], [([model.name], getattr(model.counts, attribute)) for model in models])
    for attribute, told in families.OWN_COUNTERS.items():
        yield _counter(told, [], [([], getattr(counts, attribute))])
    finished = [([each.name, reason], n) for each in models for reason, n in each.counts.finished.items()]
    says = ("vllm:request_success", "Sequences that ended, by how.")
    yield _counter(says, ["model_name", "finished_reason"], finished)
    for attribute, told in families.TGI_COUNTERS.items():
        yield _untyped(told, [({}, getattr(counts, attribute))])
    failed = [({"err": err}, count) for err, count in counts.failed.items()]
    yield _untyped(("tgi_request_failure", "Requests that did not end well, by why."), failed)
    responses = [([str(status)], count) for status, count in sorted(counts.responses.items())]
    yield _counter(("moe_ray_gateway_http_responses", "HTTP responses by status."), ["status"], responses)
    in_flight = ("moe_ray_gateway_http_requests_in_flight", "HTTP requests that are being answered.")
    yield _gauge(in_flight, [], [([], counts.in_flight)])


def _trunks(models: Sequence[ModelTold]) -> Iterator[Metric]:
    trunks = [told for model in models for told in model.trunks]
    labels = [[model.name, told.info.replica_id] for model in models for told in model.trunks]
    for field, says in families.TRUNK_GAUGES.items():
        yield _gauge(says, ENGINE, [(own, getattr(t.load, field)) for own, t in zip(labels, trunks, strict=True)])
    for field, says in families.TRUNK_COUNTERS.items():
        yield _counter(says, ENGINE, [(own, getattr(t.counters, field)) for own, t in zip(labels, trunks, strict=True)])
    used = [told.kv_use for told in trunks]
    says = ("vllm:kv_cache_usage_perc", "Share of the KV blocks that sequences hold: 1 is all.")
    yield _gauge(says, ENGINE, zip(labels, used, strict=True))
    tokens = HistogramMetricFamily(*families.STEP_TOKENS, labels=ENGINE)
    for own, told in zip(labels, trunks, strict=True):
        _add(tokens, own, _histogram(TOKEN_BOUNDS, told.counters.step_tokens))
    yield tokens
    cache = ("vllm:cache_config_info", "The KV cache of a trunk.")
    sizes = [
        [*own, str(t.info.kv_cache_tokens // max(t.load.kv_blocks_total, 1)), str(t.load.kv_blocks_total)]
        for own, t in zip(labels, trunks, strict=True)
    ]
    yield _gauge(cache, [*ENGINE, "block_size", "num_gpu_blocks"], [(size, 1) for size in sizes])
    yield from _own_of_trunks(trunks)
    yield from _batches(trunks)


def _own_of_trunks(trunks: Sequence[TrunkTold]) -> Iterator[Metric]:
    """The names that Ray exports with `ray_` before them (deploy/metrics.py)."""
    for name, field, says in (
        ("running", "num_running", "Sequences being computed."),
        ("waiting", "num_waiting", "Sequences waiting to be admitted."),
        ("kv_blocks", "kv_blocks_total", "Blocks of the KV cache."),
        ("kv_blocks_free", "kv_blocks_free", "Blocks of the KV cache that no sequence holds."),
    ):
        values = [([told.info.replica_id], getattr(told.load, field)) for told in trunks]
        yield _gauge((f"moe_ray_trunk_{name}", says), ["trunk"], values)
    for field in ("prompt_tokens", "generated_tokens", "steps", "degraded_tokens"):
        values = [([told.info.replica_id], getattr(told.counters, field)) for told in trunks]
        yield _counter((f"moe_ray_trunk_{field}", f"The trunk's {field.replace('_', ' ')}."), ["trunk"], values)


def _batches(trunks: Sequence[TrunkTold]) -> Iterator[Metric]:
    """TGI's: of all trunks together, as it has one."""
    waiting, running = (sum(getattr(t.load, field) for t in trunks) for field in ("num_waiting", "num_running"))
    held = sum(int(t.info.kv_cache_tokens * t.kv_use) for t in trunks)
    room = sum(t.info.kv_cache_tokens for t in trunks)
    yield _gauge(("tgi_queue_size", "Sequences that wait."), [], [([], waiting)])
    yield _gauge(("tgi_batch_current_size", "Sequences being computed."), [], [([], running)])
    yield _gauge(("tgi_batch_current_max_tokens", "Tokens in held KV blocks."), [], [([], held)])
    yield _gauge(("tgi_batch_max_total_tokens", "Tokens that the KV caches hold."), [], [([], room)])
    joined = sum(told.counters.joined_steps for told in trunks)
    concat = ("tgi_batch_concat", "Steps that computed a prompt beside decoding sequences.")
    yield _untyped(concat, [({"reason": "chunking"}, joined)])
    sizes = HistogramMetricFamily(*families.STEP_SEQUENCES)
    _add(sizes, [], _histogram(SEQUENCE_BOUNDS, *(told.counters.step_sequences for told in trunks)))
    yield sizes
    steps = {kind: _histogram(STEP_BOUNDS, *(getattr(told.counters, kind).steps for told in trunks)) for kind in KINDS}
    numbers = [({"method": str(kind)}, sum(steps[kind].counts)) for kind in KINDS]
    yield _untyped(("tgi_batch_inference_count", "Steps."), numbers)
    yield _untyped(("tgi_batch_inference_success", "Steps that were computed."), numbers)
    durations = HistogramMetricFamily(*families.STEPS, labels=["method"])
    for kind in KINDS:
        _add(durations, [kind], steps[kind])
    yield durations
    for place, stage in enumerate(STAGES):
        family = HistogramMetricFamily(*families.TGI_STAGES[stage], labels=["method"])
        for kind in KINDS:
            every = [getattr(told.counters, kind).stages for told in trunks]
            _add(family, [kind], _histogram(STEP_BOUNDS, *(own[place] for own in every if len(own) > place)))
        yield family


def _experts(load: Mapping[str, Any]) -> Iterator[Metric]:
    experts = load.get("experts", ())
    labels = ["expert", "deployment", "replica"]
    for field, says in families.REPLICA_GAUGES.items():
        values = [
            ([str(expert["expert"]), replica["deployment"], replica["replica_id"]], replica[field])
            for expert in experts
            for replica in expert["replicas"]
        ]
        yield _gauge(says, labels, values)
    if sum(len(expert["rows_per_layer"]) for expert in experts) <= families.MOST_LAYER_SERIES:
        rows = [
            ([str(expert["expert"]), str(layer)], count)
            for expert in experts
            for layer, count in enumerate(expert["rows_per_layer"])
        ]
        yield _gauge(families.LAYER_ROWS, ["expert", "layer"], rows)


def _histogram(bounds: Sequence[float], *told: pb.Distribution) -> Histogram:
    """The sum of distributions; of one with other bounds, which another version of a trunk sent, nothing."""
    whole = Histogram(bounds)
    for each in told:
        if len(each.counts) == len(whole.counts):
            whole.counts = [a + b for a, b in zip(whole.counts, each.counts, strict=True)]
            whole.total += each.total
    return whole


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    seen, buckets = 0, list[tuple[str, float]]()
    for bound, count in zip((*map(float, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        seen += count
        buckets.append((str(bound), seen))
    family.add_metric(labels, buckets, histogram.total)


def _counter(
    told: tuple[str, str], labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(*told, labels=labels)
    for own, value in values:
        family.add_metric(own, value)
    return family


def _gauge(
    told: tuple[str, str], labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(*told, labels=labels)
    for own, value in values:
        family.add_metric(own, value)
    return family


def _untyped(told: tuple[str, str], values: Iterable[tuple[dict[str, str], float]]) -> Metric:
    name, says = told
    family = Metric(name, says, "unknown")
    for own, value in values:
        family.add_sample(name, own, value)
    return family
