"""Whether to load KV blocks or to compute them: by the times that each took. No torch."""

from __future__ import annotations

from typing import Final

LEARNING_RATE: Final = 0.2
LEAST_TOKENS: Final = 32
"""Of a step that says what a token takes: in smaller ones that is mostly the step's own time."""
RETRY: Final = 32
"""Refusals in a row after which loading is tried again: a disk may have been slow for other reasons."""


class LoadTimes:
    """Means that forget. The engine's thread decides; reads are noted by the thread that reads.

    >>> times = LoadTimes(block_size=16)
    >>> times.note_step(tokens=512, context=512, seconds=5.12)
    >>> times.note_copies(blocks=4, seconds=0.004)
    >>> times.pays(blocks=32, context=0)  # 32 ms against 5.12 s
    True
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._token_s: dict[int, float] = {}
        """bit_length of the context → seconds of a token."""
        self._copy_s: float | None = None
        self._read_s: float | None = None
        self._refusals = 0

    def note_step(self, tokens: int, context: int, seconds: float) -> None:
        """A step computed tokens of prompts, the last of them at `context`."""
        if tokens >= LEAST_TOKENS:
            size = context.bit_length()
            self._token_s[size] = _mean(self._token_s.get(size), seconds / tokens)

    def note_copies(self, blocks: int, seconds: float) -> None:
        """Blocks were copied from host memory to the cache."""
        self._copy_s = _mean(self._copy_s, seconds / blocks)

    def note_reads(self, blocks: int, seconds: float) -> None:
        """Blocks were read from a disk, and found sound."""
        self._read_s = _mean(self._read_s, seconds / blocks)

    def pays(self, blocks: int, context: int, from_disk: bool = False) -> bool:
        """Whether to load blocks behind `context` tokens. Yes where a time is not known yet: so it becomes known."""
        computing = self._computing_s(context + blocks * self._block_size)
        loading = [self._copy_s, self._read_s] if from_disk else [self._copy_s]
        known = [each for each in loading if each is not None]
        slower = computing is not None and sum(known) > computing * self._block_size
        if slower and len(known) == len(loading) and self._refusals < RETRY:
            self._refusals += 1
            return False
        self._refusals = 0
        return True

    def _computing_s(self, context: int) -> float | None:
        """Seconds of a token at about this context: of the nearest one below that is known, or above."""
        size = context.bit_length()
        below = [each for each in self._token_s if each <= size]
        nearest = max(below) if below else min(self._token_s, default=None)
        return None if nearest is None else self._token_s[nearest]


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + LEARNING_RATE * (now - before)
