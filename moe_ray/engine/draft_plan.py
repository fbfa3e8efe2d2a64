"""How many drafts of which kind a step verifies, decided from measured times and acceptance. Pure; no torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

DraftKind = Literal["ngram", "model"]

KEPT: Final = 9
"""Times kept of each size of pass, of which the median counts: one pass that was disturbed changes nothing."""
EXACT: Final = 16
"""Sizes up to this are told apart one by one, larger ones to three bits."""
GAIN: Final = 1.03
"""Drafts must promise so much more speed than none: what is measured is not exact."""


class PassTimes:
    """What passes of a model take by their number of tokens: measured where there were any, else guessed from those.

    >>> times = PassTimes(lambda tokens: 1.0 + tokens)
    >>> times.note(1, 0.020)
    >>> round(times.of(3), 6)
    0.04
    """

    def __init__(self, shape: Callable[[int], float]) -> None:
        """`shape`: what passes take in a unit of its own, for sizes that were not measured."""
        self._shape = shape
        self._kept: dict[int, deque[float]] = {}
        self._scales: dict[int, float] = {}
        """Size → the median of what is kept."""
        self._sizes: list[int] = []

    @property
    def known(self) -> bool:
        """Whether anything was measured; until then `of` is in the unit of the shape."""
        return bool(self._kept)

    def note(self, tokens: int, seconds: float) -> None:
        """Take in one pass of so many tokens."""
        size = _size(tokens)
        if size not in self._kept:
            self._kept[size] = deque(maxlen=KEPT)
            insort(self._sizes, size)
        self._kept[size].append(seconds / self._shape(tokens))
        self._scales[size] = median(self._kept[size])

    def of(self, tokens: int) -> float:
        """Seconds of a pass of so many tokens.

        What was measured of the next smaller and the next larger size is applied to the shape, in proportion to the
        distance from both.
        """
        if not self._sizes:
            return self._shape(tokens)
        size = _size(tokens)
        place = bisect_left(self._sizes, size)
        above = self._sizes[min(place, len(self._sizes) - 1)]
        below = above if above == size else self._sizes[max(place - 1, 0)]
        if above <= below:
            return self._shape(tokens) * self._scales[above]
        share = min(max((size - below) / (above - below), 0.0), 1.0)
        return self._shape(tokens) * ((1 - share) * self._scales[below] + share * self._scales[above])


def _size(tokens: int) -> int:
    shift = 0 if tokens <= EXACT else tokens.bit_length() - 3
    return tokens >> shift << shift


@dataclass(frozen=True, slots=True)
class Offer:
    """What there is to verify for one sequence of a step."""

    most: int
    """Drafts that it may have; 0: none, it does not decode."""
    found: int = 0
    """Drafts that were looked up."""
    lookup_acceptance: float = 0.0
    """The chance that a looked-up draft is right if those before it were."""
    model_acceptance: float | None = None
    """The same of the draft model's; None: it is not to be asked."""
    catch_up: float = 0.0
    """What asking it costs beside its passes, in the unit of `DraftCosts`."""

    def gains(self, kind: DraftKind, rounds: int) -> Iterator[float]:
        """What the first, the second, … draft adds to the tokens of the step, on average."""
        acceptance = self.lookup_acceptance if kind == "ngram" else self.model_acceptance or 0.0
        likely = 1.0
        for _ in range(min(self.most, self.found if kind == "ngram" else rounds)):
            likely *= acceptance
            yield likely


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What is to be weighed, in one unit of time."""

    step: Callable[[int], float]
    """A step of the target model of so many tokens."""
    draft: Callable[[int], float]
    """A pass of the draft model over so many tokens: one of each sequence."""


def choose_drafts(offers: Seq[Offer], costs: DraftCosts, tokens: int, budget: int) -> list[tuple[DraftKind, int]]:
    """Kind and number of drafts for each offer, with which a step of `tokens` tokens yields most tokens per time.

    At most `budget` drafts. Drafts of the model take as many passes as the longest of them; all sequences share these.
    For each number of passes every sequence takes the kind that promises more, the drafts of all sequences are put in
    the order of their likelihood, and the best number of them is found: k drafts of acceptance a yield
    a + … + a^k tokens (Leviathan et al. 2023, arXiv:2211.17192, section 3.5).
    """
    most = min(budget, sum(offer.most for offer in offers))
    steps = [costs.step(tokens + count) for count in range(most + 1)]
    plain = tokens / steps[0]
    best: list[tuple[DraftKind, int]] = [("ngram", 0)] * len(offers)
    best_rate = GAIN * plain
    passes = max((offer.most for offer in offers if offer.model_acceptance is not None), default=0)
    for rounds in range(passes + 1):
        kinds: list[DraftKind] = [_better(offer, rounds) for offer in offers]
        asked = kinds.count("model")
        if rounds and not asked:
            continue
        # The first pass of a sequence whose drafts all came true computes two tokens: its last one was no draft.
        drafting = costs.draft(asked) * rounds if rounds else 0.0
        drafting += sum(offer.catch_up for offer, kind in zip(offers, kinds, strict=True) if kind == "model")
        likely = [(gain, i) for i, offer in enumerate(offers) for gain in offer.gains(kinds[i], rounds)]
        likely.sort(key=lambda each: -each[0])  # stable: of one sequence, the first draft stays before the second
        gained, taken = 0.0, 0
        for count, (gain, _) in enumerate(likely[:most], 1):
            gained += gain
            rate = (tokens + gained) / (steps[count] + drafting)
            if rate > best_rate:
                best_rate, taken = rate, count
        if taken:
            counts = [0] * len(offers)
            for _, i in likely[:taken]:
                counts[i] += 1
            best = list(zip(kinds, counts, strict=True))
    return best


def _better(offer: Offer, rounds: int) -> DraftKind:
    if not rounds or offer.model_acceptance is None or not offer.most:
        return "ngram"
    return "model" if sum(offer.gains("model", rounds)) > sum(offer.gains("ngram", rounds)) else "ngram"
