"""Watches the token events of one job: counts them, and remembers what its log line and its span tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from moe_ray.api.generation import EventSource
from moe_ray.api.output import JobOutput
from moe_ray.core import Request, TokenEvent
from moe_ray.errors import InvalidRequest, Overloaded
from moe_ray.observe.request_counts import RequestCounts


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    queue_s: float = 0.0
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """One sequence that has ended, as it was counted."""

    reason: str
    """Of `FINISH_REASONS`."""
    num_prompt: int
    num_output: int
    first_token_s: float | None
    """None: there was no token, and the times below are 0."""
    per_token_s: float | None
    whole_s: float
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class JobWatch:
    """An `EventSource` that counts what another one says. One loop."""

    def __init__(
        self,
        source: EventSource,
        output: JobOutput,
        counts: RequestCounts,
        arrived_s: float,
        on_end: Callable[[Ended], None] | None = None,
    ) -> None:
        """`output`: what the events are taken into; `arrived_s`: when the HTTP request came, by `time.perf_counter`.

        `on_end` is told of each sequence's end.
        """
        self._source, self._output, self._counts, self._arrived_s = source, output, counts, arrived_s
        self._on_end = on_end
        requests = output.job.requests
        self._opened_s = time.perf_counter()
        self._live = {index: _Sequence(request) for index, request in requests}
        self._num_choices = len(requests)
        self._closed = False
        self._ending: list[tuple[int, str]] = []
        """Sequences whose last event is out, and how the engine ended them: their text may have ended otherwise."""
        self._failure: str | None = None
        self._queue_s = self._longest = 0.0
        # What came before the first token is told of the whole job.
        self.num_prompt = sum(len(request.prompt_token_ids) for _, request in requests)
        self.num_output = self.num_cached = 0
        self.first_token_s: float | None = None
        """After the arrival."""
        self.reasons: list[str] = []
        counts.jobs += 1

    async def next(self, timeout_s: float | None) -> tuple[int, TokenEvent] | None:
        """The source's next event."""
        if self._ending:
            self._end_those()
        told = await self._source.next(timeout_s)
        if told is not None:
            self._note(*told)
        return told

    def stop(self, index: int) -> None:
        """End one sequence early, because its text has ended: `finish_reason` "stop". Idempotent."""
        self._end(index, "stop")
        self._source.stop(index)

    def close(self) -> None:
        """End every sequence. Idempotent."""
        self._end_those()
        for index in list(self._live):
            self._failure = self._failure or "dropped"
            self._end(index, "abort")
        if not self._closed:
            self._closed = True
            self._end_job()
        self._source.close()

    def _note(self, index: int, event: TokenEvent) -> None:
        count = len(event.token_ids)
        if count and (seq := self._live.get(index)) is not None:
            now, counts = time.perf_counter(), self._counts
            if seq.num_tokens:
                counts.token_gap_s.observe(now - seq.last_s)
            else:
                self._first(seq, event, now)
            seq.last_s = now
            seq.num_tokens += count
            counts.output_tokens += count
            counts.extra_tokens.observe(count - 1)
            if event.degraded_positions:
                counts.degraded_tokens += len(event.degraded_positions)
        if event.last:
            if event.error is not None:
                self._failure = _failure(event.error)
            self._ending.append((index, event.finish_reason or "error"))

    def _first(self, seq: _Sequence, event: TokenEvent, now: float) -> None:
        seq.first_s, seq.queue_s, seq.num_cached = now, event.queue_s, event.num_cached_tokens
        waited = now - self._arrived_s
        self._counts.first_token_s.observe(waited)
        self._counts.prompt_tokens += len(seq.request.prompt_token_ids)
        self._counts.cached_tokens += seq.num_cached
        self.num_cached += seq.num_cached
        if self.first_token_s is None:
            self.first_token_s = waited

    def _end_those(self) -> None:
        for index, reason in self._ending:
            self._end(index, self._output.choices[index].finish_reason or reason)
        self._ending.clear()

    def _end(self, index: int, reason: str) -> None:
        seq = self._live.pop(index, None)
        if seq is None:
            return
        ended = self._measure(seq, reason)
        self.num_output += seq.num_tokens
        self.reasons.append(reason)
        self._queue_s = max(self._queue_s, seq.queue_s)
        self._longest = max(self._longest, seq.num_tokens)
        count_end(self._counts, ended)
        if (asked := seq.request.sampling.max_tokens) is not None:
            self._counts.asked_tokens.observe(asked)
            self._counts.job_asked_tokens.observe(asked)
        if self._on_end is not None:
            self._on_end(ended)

    def _measure(self, seq: _Sequence, reason: str) -> Ended:
        whole_s, num_prompt = time.perf_counter() - self._arrived_s, len(seq.request.prompt_token_ids)
        if not seq.num_tokens:
            return Ended(reason, num_prompt, 0, None, None, whole_s)
        decode_s = seq.last_s - seq.first_s
        return Ended(
            reason,
            num_prompt,
            seq.num_tokens,
            seq.first_s - self._arrived_s,
            decode_s / (seq.num_tokens - 1) if seq.num_tokens > 1 else None,
            whole_s,
            seq.queue_s,
            max(0.0, seq.first_s - self._opened_s - seq.queue_s),
            decode_s,
        )

    def _end_job(self) -> None:
        counts = self._counts
        counts.num_choices.observe(self._num_choices)
        if self._failure is not None:
            counts.failed[self._failure] += 1
            return
        whole_s, parse_s = time.perf_counter() - self._arrived_s, self._opened_s - self._arrived_s
        inference_s = max(0.0, whole_s - parse_s - self._queue_s)
        counts.jobs_done += 1
        counts.job_s.observe(whole_s)
        counts.job_parse_s.observe(parse_s)
        counts.job_queue_s.observe(self._queue_s)
        counts.job_inference_s.observe(inference_s)
        counts.job_per_token_s.observe(inference_s / max(self.num_output, 1))
        counts.job_prompt_length.observe(self.num_prompt)
        counts.job_output_length.observe(self.num_output)
        counts.longest_output.observe(self._longest)


def count_end(counts: RequestCounts, ended: Ended) -> None:
    """Count one sequence that has ended; the times of one that ended in an error are not representative."""
    counts.finished[ended.reason] += 1
    if ended.reason == "error":
        return
    counts.whole_s.observe(ended.whole_s)
    counts.prompt_length.observe(ended.num_prompt)
    counts.output_length.observe(ended.num_output)
    if ended.first_token_s is None:
        return
    counts.queue_s.observe(ended.queue_s)
    counts.prefill_s.observe(ended.prefill_s)
    counts.decode_s.observe(ended.decode_s)
    counts.inference_s.observe(ended.prefill_s + ended.decode_s)
    if ended.per_token_s is not None:
        counts.per_token_s.observe(ended.per_token_s)


def _failure(error: Exception) -> str:
    if isinstance(error, InvalidRequest):
        return "validation"
    return "overloaded" if isinstance(error, Overloaded) else "generation"
