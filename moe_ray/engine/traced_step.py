"""Steps of requests that are traced: which are timed layer by layer, and what is told of them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_ray.core import Batch
from moe_ray.timings import LayerTimes


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One step; times by `time.perf_counter`."""

    request_ids: tuple[str, ...]
    """The traced requests for which it was timed."""
    begun_s: float
    ended_s: float
    num_sequences: int
    num_tokens: int
    layers: Sequence[LayerTimes]
    """In the order in which their rows came; several of one layer with micro-batches."""


class StepTracer:
    """Has the first steps of each traced request timed. The engine's thread."""

    def __init__(self, tell: Callable[[TracedStep], None], most_steps: int) -> None:
        """`tell` is called after each such step, and must not block; `most_steps` of each request."""
        self._tell, self._most_steps = tell, most_steps

    def begin(self, batch: Batch) -> tuple[str, ...]:
        """Name the requests for which a step is timed; where there are some, `batch` gets room for its layers."""
        most = self._most_steps
        traced = [seq for seq in batch.sequences if seq.request.traceparent and seq.times.num_traced_steps < most]
        for seq in traced:
            seq.times.num_traced_steps += 1
        if traced:
            batch.layer_times = []
        return tuple(seq.request.request_id for seq in traced)

    def end(self, batch: Batch, request_ids: tuple[str, ...], begun_s: float, ended_s: float) -> None:
        """Tell of a computed step, unless it is timed for nobody."""
        if request_ids:
            layers = batch.layer_times or ()
            sequences, tokens = len(batch.sequences), batch.num_tokens
            self._tell(TracedStep(request_ids, begun_s, ended_s, sequences, tokens, layers))
