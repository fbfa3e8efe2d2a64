"""What a request to TGI's routes took, as its response headers tell."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from moe_ray.api.output import JobOutput


@dataclass(slots=True)
class Stopwatch:
    """The moments of one request, on `time.monotonic`."""

    started: float = field(default_factory=time.monotonic)
    validated: float = 0.0
    """When its job was made."""

    def mark_validated(self) -> None:
        """The request is valid and tokenized; from now on it waits."""
        self.validated = time.monotonic()


def timing_headers(watch: Stopwatch, output: JobOutput, best: int) -> dict[str, str]:
    """The headers of a whole response. x-compute-time is in seconds, the other times in milliseconds.

    Validation, queue and inference add up to the total. The queue is what the trunk measured for the choice `best`.
    """
    choice = output.choices[best]
    total = time.monotonic() - watch.started
    validation = watch.validated - watch.started
    queue = min(choice.queue_s, total - validation)
    inference = total - validation - queue
    return {
        "x-compute-time": repr(total),
        "x-total-time": _ms(total),
        "x-validation-time": _ms(validation),
        "x-queue-time": _ms(queue),
        "x-inference-time": _ms(inference),
        "x-time-per-token": _ms(inference / max(choice.num_tokens, 1)),
        "x-prompt-tokens": str(len(choice.request.prompt_token_ids)),
        "x-generated-tokens": str(choice.num_tokens),
    }


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
