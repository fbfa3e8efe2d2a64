"""The windows in which a text longer than the model's context is scored. Plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_ray.errors import ConfigError, InvalidRequest


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of a text that the model sees at once, and those of them that are scored."""

    start: int
    end: int
    first: int
    """The first token that is scored; those before it are context. Each is predicted from all before it."""

    @property
    def scored(self) -> int:
        """How many of its tokens are scored."""
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of a text, and how they are cut into windows."""

    token_ids: Sequence[int]
    context: int
    stride: int

    def windows(self) -> list[Window]:
        """Those of `windows`. Raises `InvalidRequest` where there is nothing to score, `ConfigError` as `windows`."""
        found = list(windows(len(self.token_ids), self.context, self.stride))
        if not found:
            raise InvalidRequest(f"the text has {len(self.token_ids)} tokens: there is nothing to predict", "text")
        return found


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of `context` tokens that begin `stride` apart. Each token is scored once, in the first window it is in.

    The sliding window of transformers' guide "Perplexity of fixed-length models". The first token of a text is not
    scored, and where windows do not overlap (stride = context) the first one of each is not: nothing comes before it.

    >>> [(w.start, w.end, w.first) for w in windows(10, context=4, stride=3)]
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    """
    check_windows(context, stride)
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        first = max(scored, start + 1)
        if first < end:
            yield Window(start, end, first)
        scored = end
        if end == num_tokens:
            return


def check_windows(context: int, stride: int) -> None:
    """Raise `ConfigError` for windows that score nothing, or leave tokens out."""
    if context < 2:
        raise ConfigError(f"--context: a window has at least 2 tokens, got {context}")
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride: from 1 to --context ({context}), got {stride}")
