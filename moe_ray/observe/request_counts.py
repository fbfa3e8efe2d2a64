"""What the requests of one gateway came to, as it is counted while they run. Plain numbers; nothing of Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moe_ray.histogram import STEP_BOUNDS, Histogram, rounded_bounds

FIRST_TOKEN_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BOUNDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS: Final = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH_BOUNDS: Final = rounded_bounds(200_000)
FINISH_REASONS: Final = ("stop", "length", "abort", "error")
FAILURES: Final = ("validation", "overloaded", "generation", "dropped")


class RequestCounts:
    """Of all requests since the start. One thread writes and reads: the gateway's loop.

    A *sequence* is one choice of a response; a *job* is all that one HTTP request generates.
    """

    def __init__(self) -> None:
        self.first_token_s = Histogram(FIRST_TOKEN_BOUNDS)
        """From the HTTP request's arrival to the first token of each sequence."""
        self.token_gap_s = Histogram(TOKEN_GAP_BOUNDS)
        """Between two steps that brought a sequence tokens."""
        self.per_token_s = Histogram(TOKEN_GAP_BOUNDS)
        """Of each sequence: from its first token to its last one, over the tokens after the first."""
        self.whole_s = Histogram(REQUEST_BOUNDS)
        self.queue_s = Histogram(REQUEST_BOUNDS)
        self.prefill_s = Histogram(REQUEST_BOUNDS)
        self.decode_s = Histogram(REQUEST_BOUNDS)
        self.inference_s = Histogram(REQUEST_BOUNDS)
        """Prefill and decode."""
        self.prompt_length = Histogram(LENGTH_BOUNDS)
        self.output_length = Histogram(LENGTH_BOUNDS)
        self.asked_tokens = Histogram(LENGTH_BOUNDS)
        """The most tokens that a sequence might have had."""
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        """Sequences by their end."""
        self.prompt_tokens = self.output_tokens = self.cached_tokens = self.degraded_tokens = 0

        self.num_choices = Histogram((1, 2, 5, 10, 20))
        """Sequences of each job."""
        self.longest_output = Histogram(LENGTH_BOUNDS)
        """Of each job."""
        self.jobs = self.jobs_done = 0
        self.failed = dict.fromkeys(FAILURES, 0)
        """Jobs, and HTTP requests that became none, by what ended them."""
        self.job_s = Histogram(STEP_BOUNDS)
        self.job_parse_s = Histogram(STEP_BOUNDS)
        self.job_queue_s = Histogram(STEP_BOUNDS)
        self.job_inference_s = Histogram(STEP_BOUNDS)
        self.job_per_token_s = Histogram(STEP_BOUNDS)
        self.job_prompt_length = Histogram(LENGTH_BOUNDS)
        self.job_output_length = Histogram(LENGTH_BOUNDS)
        self.job_asked_tokens = Histogram(LENGTH_BOUNDS)
        self.extra_tokens = Histogram(range(17))
        """Tokens of a step beyond its first one, which speculative decoding brought."""

        self.responses: dict[int, int] = {}
        """HTTP responses by status."""
        self.in_flight = 0
        """HTTP requests that are being answered."""


def summed(every: Sequence[RequestCounts]) -> RequestCounts:
    """The counts of several models together; of one, they themselves."""
    if len(every) == 1:
        return every[0]
    whole = RequestCounts()
    for counts in every:
        for name, value in vars(counts).items():
            own = getattr(whole, name)
            if isinstance(value, Histogram):
                own.counts = [a + b for a, b in zip(own.counts, value.counts, strict=True)]
                own.total += value.total
            elif isinstance(value, dict):
                for key, count in value.items():
                    own[key] = own.get(key, 0) + count
            else:
                setattr(whole, name, own + value)
    return whole
