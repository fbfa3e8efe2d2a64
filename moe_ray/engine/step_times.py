"""How long the engine's steps take, stage by stage, and how large they are. No torch."""

from __future__ import annotations

from typing import Final, Literal

from moe_ray.core import Batch
from moe_ray.histogram import STEP_BOUNDS, Histogram

Kind = Literal["prefill", "decode"]
KINDS: Final[tuple[Kind, ...]] = ("prefill", "decode")
STAGES: Final = ("schedule", "forward", "sample", "update")
"""Of a step, in their order."""
TOKEN_BOUNDS: Final = tuple(2**k for k in range(15))
SEQUENCE_BOUNDS: Final = tuple(2**k for k in range(11))


def kind_of(batch: Batch) -> Kind:
    """Return "prefill" for a step that computes more of a prompt than its last token, however many decodes it has."""
    return "prefill" if batch.num_tokens > sum(batch.num_sampled) else "decode"


class StepTimes:
    """Of all steps since the start. The engine's thread notes; any thread may read."""

    def __init__(self) -> None:
        self.steps = {kind: Histogram(STEP_BOUNDS) for kind in KINDS}
        """Seconds of whole steps."""
        self.stages = {(kind, stage): Histogram(STEP_BOUNDS) for kind in KINDS for stage in STAGES}
        self.tokens = Histogram(TOKEN_BOUNDS)
        self.sequences = Histogram(SEQUENCE_BOUNDS)
        self.joined = 0
        """Steps that computed a prompt beside sequences that were decoding."""

    def note(self, batch: Batch, moments: tuple[float, float, float, float, float]) -> None:
        """Count a step. `moments`: when it began and when each of `STAGES` had ended, in seconds."""
        kind = kind_of(batch)
        self.steps[kind].observe(moments[-1] - moments[0])
        for stage, begun, ended in zip(STAGES, moments, moments[1:], strict=False):
            self.stages[kind, stage].observe(ended - begun)
        self.tokens.observe(batch.num_tokens)
        self.sequences.observe(len(batch.sequences))
        starts = batch.query_start
        if kind == "prefill" and any(
            count and starts[i + 1] - starts[i] == count for i, count in enumerate(batch.num_sampled)
        ):
            self.joined += 1
