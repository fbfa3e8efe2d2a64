"""Drafts by prompt lookup: guesses the next tokens from what followed the last ones before. No torch.

Prompt lookup decoding (Saxena 2023): where a text quotes itself (summaries, edits of code, loops), what followed the
last few tokens the last time they stood there is a good guess, and costs no draft model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from moe_ray.core import Sequence

# What a step costs, in readings of one expert's weights.
STEP_COST = 1.0
"""The shared weights (0.3 of one of Mixtral's experts) and the round trips of a step, whatever its tokens."""
ARITHMETIC_COST = 0.05
"""The arithmetic of one token in one of its experts, between a CPU's share and a GPU's."""

FIRST_ACCEPTANCE = 0.7
"""Of a sequence that nothing is known of: worth two or three drafts alone, and none after two misses."""
LEARNING_RATE = 0.2
MAX_INDEXED_PER_STEP = 4096
"""Tokens that one step takes into the indexes (about 5 ms), so that a long cached prompt does not stall the others."""


def num_accepted(draft: Seq[int], sampled: Seq[int]) -> int:
    """How many leading drafts are what was sampled in their place; the token sampled after them is right as well.

    Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192). A draft x, looked up or a model's choice, is a
    point mass, which their rejection sampling accepts with the model's probability p(x), drawing from the rest of p
    otherwise: that is to draw from p once and to look whether it was x. The noise of a position depends on (seed,
    position) alone, so the output is, token for token, the one without drafts, greedy or sampled.
    """
    count = 0
    while count < len(draft) and draft[count] == sampled[count]:
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What steps of one model cost, and so how many drafts are worth verifying.

    >>> StepCosts(num_experts=8, experts_per_token=2).draft_length(acceptance=0.9, most=4, tokens=1)
    4
    """

    num_experts: int
    experts_per_token: int

    def of(self, tokens: int) -> float:
        """Time of a step of so many tokens, in readings of one expert.

        n tokens, each of which takes K of E experts, touch E * (1 - (1 - K/E)^n) of them under uniform routing: of
        Mixtral's 8 experts, 2 a token, 2, 3.5, 4.6, 5.5, 6.1 for n = 1 .. 5. This holds for experts behind one memory;
        where each has a card of its own the readings overlap, and drafts pay sooner than is reckoned here.
        """
        touched = self.num_experts * (1 - (1 - self.experts_per_token / self.num_experts) ** tokens)
        return STEP_COST + touched + ARITHMETIC_COST * self.experts_per_token * tokens

    def draft_length(self, acceptance: float, most: int, tokens: int) -> int:
        """The number of drafts, 0 .. most, with which a step that already holds `tokens` yields most tokens per time.

        `acceptance` is the chance that a draft is right if those before it were, so k drafts yield
        acceptance + ... + acceptance^k tokens (Leviathan et al., section 3.5). For Mixtral, alone (tokens = 1), one
        draft costs half a step, four cost one and a half: below an acceptance of about 0.5 none pays. Beside 15 other
        decodes nearly all experts are read anyway and 0.2 is enough; beside a long prefill the arithmetic counts, and
        it takes 0.9.
        """
        best, best_rate = 0, tokens / self.of(tokens)
        likely, gained = 1.0, 0.0
        for count in range(1, most + 1):
            likely *= acceptance
            gained += likely
            rate = (tokens + gained) / self.of(tokens + count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


class NgramIndex:
    """Where each n-gram of one growing list of tokens stood last. The caller passes the same list every time."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._follower: dict[tuple[int, ...], int] = {}
        """n-gram → position of the token after its last occurrence."""
        self._next = shortest
        """The first follower that is not in the index yet."""

    def extend(self, token_ids: list[int], most: int) -> int:
        """Take in tokens that are new, at most so many; return how many."""
        start, end = self._next, min(len(token_ids), self._next + most)
        for position in range(start, end):
            for n in range(self._shortest, min(self._longest, position) + 1):
                self._follower[tuple(token_ids[position - n : position])] = position
        self._next = max(start, end)
        return self._next - start

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        """The `count` tokens that followed the last n tokens when these stood there last, for the longest n known.

        Empty if no n is. A match that runs into the end goes on with its own copy, as in LZ77: a loop stays a loop.
        """
        for n in range(min(self._longest, len(token_ids)), self._shortest - 1, -1):
            position = self._follower.get(tuple(token_ids[-n:]))
            if position is not None:
                draft = token_ids[position : position + count]
                period = len(token_ids) - position
                while len(draft) < count:
                    draft.append(draft[-period])
                return draft
        return []


@dataclass(slots=True)
class _Known:
    """What is known of one sequence."""

    index: NgramIndex
    acceptance: float = FIRST_ACCEPTANCE


class Drafter:
    """The indexes of all live sequences, and how well guessing went for each."""

    def __init__(self, shortest: int, longest: int, costs: StepCosts) -> None:
        """Look up n-grams of `shortest` to `longest` tokens."""
        self._shortest = shortest
        self._longest = longest
        self._costs = costs
        self._known: dict[Sequence, _Known] = {}

    def extend(self, seq: Sequence, most: int) -> int:
        """Index the tokens of `seq` that are new, at most so many; return how many."""
        known = self._known.get(seq)
        if known is None:
            known = self._known[seq] = _Known(NgramIndex(self._shortest, self._longest))
        return known.index.extend(seq.token_ids, most)

    def propose(self, seq: Sequence, most: int, tokens: int) -> list[int]:
        """Drafts worth verifying, at most so many, in a step that holds `tokens` already. `extend` first."""
        known = self._known[seq]
        count = self._costs.draft_length(known.acceptance, most, tokens)
        return known.index.propose(seq.token_ids, count) if count else []

    def peek(self, seq: Sequence, count: int) -> list[int]:
        """The next `count` tokens as far as they are found, whether worth verifying or not. `extend` first."""
        return self._known[seq].index.propose(seq.token_ids, count)

    def acceptance(self, seq: Sequence) -> float:
        """The chance that a draft of this sequence is right if those before it were. `extend` first."""
        return self._known[seq].acceptance

    def learn(self, seq: Sequence, sampled: Seq[int]) -> None:
        """Note how good a guess at `sampled` was, or would have been; called before these tokens are appended.

        A guess that was not worth verifying is judged too, at no cost: so drafting begins again when it would pay.
        """
        known = self._known[seq]
        for guess, token in zip(known.index.propose(seq.token_ids, len(sampled)), sampled, strict=False):
            known.acceptance += LEARNING_RATE * ((guess == token) - known.acceptance)
            if guess != token:
                break

    def drop(self, seq: Sequence) -> None:
        """Forget a finished sequence. Idempotent."""
        self._known.pop(seq, None)
