"""When what happened to a sequence or a layer; moments by `time.perf_counter`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SequenceTimes:
    """Of a sequence in an engine."""

    arrived_s: float = 0.0
    """When it came to the trunk."""
    queue_s: float | None = None
    """How long it waited before it was first computed; None until then."""
    num_traced_steps: int = 0
    """Steps whose layers were timed for its trace."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """The expert calls of one layer in one forward pass."""

    layer: int
    rows: tuple[int, ...]
    """Of each expert."""
    begun_s: float
    """The calls began to be sent."""
    sent_s: float
    waited_from_s: float
    """The trunk had nothing else to do; equal to `sent_s` but for micro-batches."""
    gathered_s: float
    """All rows were there."""
