"""The main series of GET /metrics once more, through Ray: of all gateways, wherever a scrape of one would not reach.

Names are vLLM's as Ray Serve LLM exports them, `ray_vllm_…`, so that Ray's own LLM dashboard shows them.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Final

from ray.util.metrics import Counter, Gauge, Histogram

from moe_ray.api.job_watch import Ended
from moe_ray.core import EngineStats
from moe_ray.observe.request_counts import FIRST_TOKEN_BOUNDS, LENGTH_BOUNDS, REQUEST_BOUNDS, TOKEN_GAP_BOUNDS

MODEL: Final = ("model_name",)

ENDED_HISTOGRAMS: Final = {
    "first_token_s": ("vllm_time_to_first_token_seconds", FIRST_TOKEN_BOUNDS, "To a sequence's first token."),
    "per_token_s": ("vllm_request_time_per_output_token_seconds", TOKEN_GAP_BOUNDS, "Per token after the first."),
    "whole_s": ("vllm_e2e_request_latency_seconds", REQUEST_BOUNDS, "To a sequence's end."),
    "queue_s": ("vllm_request_queue_time_seconds", REQUEST_BOUNDS, "Wait in the trunk."),
    "prefill_s": ("vllm_request_prefill_time_seconds", REQUEST_BOUNDS, "From first computation to first token."),
    "decode_s": ("vllm_request_decode_time_seconds", REQUEST_BOUNDS, "From the first token to the last one."),
    "num_prompt": ("vllm_request_prompt_tokens", LENGTH_BOUNDS, "Prompt tokens of a sequence."),
    "num_output": ("vllm_request_generation_tokens", LENGTH_BOUNDS, "Generated tokens of a sequence."),
}
"""Field of `Ended` → name, bounds, help."""

ENGINE_GAUGES_OF_VLLM: Final = {
    "num_running": ("vllm_num_requests_running", "Sequences being computed."),
    "num_waiting": ("vllm_num_requests_waiting", "Sequences waiting to be admitted."),
}
"""Field of `EngineStats` → name, help."""

ENGINE_COUNTERS_OF_VLLM: Final = {
    "prefix_query_tokens": ("vllm_prefix_cache_queries_total", "Tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("vllm_prefix_cache_hits_total", "Tokens found in the prefix cache."),
    "preemptions": ("vllm_num_preemptions_total", "Sequences preempted for want of KV blocks."),
}
"""Field of `EngineStats` → name, help."""

OTHERS: Final = (
    *("vllm_prompt_tokens_total", "vllm_generation_tokens_total"),
    *("vllm_request_success_total", "vllm_kv_cache_usage_perc"),
)


class SequenceMetrics:
    """Of the sequences of one gateway. Any thread calls `take`, which only notes; one calls `report` now and then."""

    def __init__(self, model: str) -> None:
        self._tags = {"model_name": model}
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._histograms = {
            field: Histogram(name, says, list(map(float, bounds)), MODEL)
            for field, (name, bounds, says) in ENDED_HISTOGRAMS.items()
        }
        self._prompt = Counter("vllm_prompt_tokens_total", "Prompt tokens of sequences that have ended.", MODEL)
        self._output = Counter("vllm_generation_tokens_total", "Tokens of sequences that have ended.", MODEL)
        self._finished = Counter(
            "vllm_request_success_total", "Sequences that ended, by how.", (*MODEL, "finished_reason")
        )

    def take(self, ended: Ended) -> None:
        """A sequence has ended."""
        self._ended.put(ended)

    def report(self) -> None:
        """Record what has ended since the last time."""
        while not self._ended.empty():
            ended = self._ended.get()
            self._finished.inc(1, {**self._tags, "finished_reason": ended.reason})
            for counter, tokens in ((self._prompt, ended.num_prompt), (self._output, ended.num_output)):
                if tokens:
                    counter.inc(tokens, self._tags)
            if ended.reason == "error":
                continue
            for field, histogram in self._histograms.items():
                value = getattr(ended, field)
                if value is not None:
                    histogram.observe(value, self._tags)


class EngineMetrics:
    """Of one trunk. One thread calls `report`, every few seconds."""

    def __init__(self, model: str, read: Callable[[], EngineStats]) -> None:
        self._tags, self._read, self._told = {"model_name": model}, read, EngineStats()
        self._gauges = {field: Gauge(*told, MODEL) for field, told in ENGINE_GAUGES_OF_VLLM.items()}
        self._counters = {field: Counter(*told, MODEL) for field, told in ENGINE_COUNTERS_OF_VLLM.items()}
        self._used = Gauge("vllm_kv_cache_usage_perc", "Share of the KV blocks that sequences hold: 1 is all.", MODEL)

    def report(self) -> None:
        """Record what the counters grew by since the last time, and the state of this moment."""
        stats = self._read()
        for field, counter in self._counters.items():
            if more := getattr(stats, field) - getattr(self._told, field):
                counter.inc(more, self._tags)
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field), self._tags)
        self._used.set(1 - stats.kv_blocks_free / max(stats.kv_blocks_total, 1), self._tags)
        self._told = stats
