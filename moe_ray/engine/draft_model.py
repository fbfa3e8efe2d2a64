"""What proposes drafts by a model of its own, as the scheduler sees it. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from moe_ray.core import Sequence


@dataclass(frozen=True, slots=True)
class DraftPass:
    """One forward pass of a draft model."""

    tokens: int
    seconds: float


class DraftModel(Protocol):
    """A small model that guesses what a large one will say next. Used by one thread.

    >>> model.propose([seq], [4])  # seq.token_ids end in "The capital of France"
    [[314, 7042, 30, 2]]
    """

    passes: list[DraftPass]
    """What the last `propose` computed, in order."""
    nbytes: int
    """Bytes of its weights and of its KV cache."""

    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """At most `counts[i]` tokens that may follow `sequences[i]`, one list for each; counts are 1 or more.

        Each sequence has blocks for its tokens and for so many drafts. None where the model has tokens of the sequence
        still to compute: it computes a bounded number of them in each call.
        """
        ...

    def behind(self, seq: Sequence) -> int:
        """Tokens of a sequence that it has to compute before it can guess: at least its newest one."""
        ...

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence. Idempotent."""
        ...
