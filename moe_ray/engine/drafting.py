"""Drafts of a step: looked up, of a draft model, or of whichever pays (speculative decoding). No torch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Final, Literal, Protocol

from moe_ray.core import Sequence
from moe_ray.engine.draft_model import DraftModel
from moe_ray.engine.draft_plan import DraftCosts, DraftKind, Offer, PassTimes, choose_drafts
from moe_ray.engine.drafts import FIRST_ACCEPTANCE, MAX_INDEXED_PER_STEP, Drafter, StepCosts

Speculation = Literal["off", "ngram", "draft", "auto"]

FIRST_TRIAL: Final = 4
"""Steps without the draft model before it is first tried out: the first steps of an engine are slow."""
TRIALS: Final = 3
"""Trials in a row before times and acceptance count as known."""
LEAST_WAIT, MOST_WAIT = 32, 512
"""Steps without the draft model between trials: doubled after each that did not make it pay. A trial costs about three
steps, so that trials take 2 % of the time in the end at most, and less where nothing changes."""
LEAST_TO_COME: Final = 32
"""Tokens that a sequence is taken to generate still, at least."""
OUTPUT_LEARNING_RATE: Final = 0.05
LEARNING_RATE: Final = 0.1
"""Of the draft model's acceptance, which is steadier than that of prompt lookup."""
USUAL_LEARNING_RATE: Final = 0.05
"""Of what sequences begin with."""
SMALLEST_PASS: Final = 0.1
"""What a pass of the draft model is taken to cost of a step of one token, until one was measured."""


class DraftOptions(Protocol):
    """What the scheduler's limits say of drafts."""

    @property
    def speculation(self) -> Speculation: ...
    @property
    def num_speculative_tokens(self) -> int: ...
    @property
    def prompt_lookup_min(self) -> int: ...
    @property
    def prompt_lookup_max(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence of a step, and how many drafts it may have."""

    seq: Sequence
    most: int
    """0: it does not decode."""


@dataclass(slots=True)
class DraftCounts:
    """Of all drafts of one kind since the start."""

    drafted: int = 0
    """Tokens that were verified."""
    accepted: int = 0
    """Those of them that are in the output."""


Slots = Callable[[Sequence, int], int]
"""Gives a sequence room for so many drafts, as far as there is any; returns for how many."""


class Drafting:
    """Chooses and collects the drafts of each step, and learns what became of them. One thread."""

    def __init__(self, options: DraftOptions, costs: StepCosts, model: DraftModel | None = None) -> None:
        """`costs`: shape of the target's step times. `model`: for "draft" and "auto"; "auto" does without one, too."""
        assert options.speculation != "draft" or model is not None, "who drafts?"
        kind = self._kind = options.speculation
        self._most, self._model = options.num_speculative_tokens, model
        self._lookup = Drafter(options.prompt_lookup_min, options.prompt_lookup_max, costs)
        self._uses_lookup = kind in ("ngram", "auto")
        self.counts: dict[DraftKind, DraftCounts] = {"ngram": DraftCounts(), "model": DraftCounts()}
        self._steps = PassTimes(costs.of)
        dense = StepCosts(num_experts=1, experts_per_token=1)
        smallest = SMALLEST_PASS * costs.of(1) / dense.of(1)
        self._passes = PassTimes(lambda tokens: smallest * dense.of(tokens))
        self._acceptance: dict[Sequence, float] = {}
        """Of the model's drafts; sequences that have none yet begin with `_usual`."""
        self._usual = FIRST_ACCEPTANCE
        self._drafted: dict[Sequence, DraftKind] = {}
        """Kinds of the drafts of the step that is being computed."""
        self._usual_output = float(LEAST_TO_COME)
        """Tokens that finished sequences generated, on average."""
        self._waited, self._wait, self._trials = 0, FIRST_TRIAL, 0
        self._drafting_s = 0.0

    def propose(self, asks: Seq[Ask], tokens: int, budget: int, slots: Slots) -> list[list[int]]:
        """Drafts for each sequence of a step that holds `tokens` tokens already, `budget` of them at most in all."""
        self._drafted.clear()
        self._drafting_s = 0.0
        if self._uses_lookup:
            to_index = MAX_INDEXED_PER_STEP
            for ask in asks:
                to_index -= self._lookup.extend(ask.seq, to_index)
        if self._kind == "ngram":
            return self._looked_up(asks, tokens, budget, slots)
        if not any(ask.most > 0 for ask in asks):
            return [[] for _ in asks]
        return self._collect(asks, self._choose(asks, tokens, budget), slots)

    def learn(self, seq: Sequence, sampled: Seq[int]) -> None:
        """Note what became certain of a sequence, before it is appended."""
        if self._uses_lookup:
            self._lookup.learn(seq, sampled)

    def count(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """Note how many drafts a sequence had in the step that was computed, and how many of them came true."""
        if not drafted:
            return
        kind = self._drafted[seq]
        self.counts[kind].drafted += drafted
        self.counts[kind].accepted += accepted
        if kind == "model":
            known = self._acceptance.get(seq, self._usual)
            for came_true in [True] * accepted + [False] * (accepted < drafted):
                known += LEARNING_RATE * (came_true - known)
                self._usual += USUAL_LEARNING_RATE * (came_true - self._usual)
            self._acceptance[seq] = known

    def note_step(self, tokens: int, seconds: float) -> None:
        """Take in how long the step of so many tokens took, from its beginning to its end."""
        self._steps.note(tokens, max(seconds - self._drafting_s, 1e-9))

    def drop(self, seq: Sequence) -> None:
        """Forget a finished sequence."""
        self._usual_output += OUTPUT_LEARNING_RATE * (seq.num_output - self._usual_output)
        self._lookup.drop(seq)
        self._acceptance.pop(seq, None)
        if self._model is not None:
            self._model.drop(seq)

    @property
    def model_bytes(self) -> int:
        """Memory of the draft model."""
        return 0 if self._model is None else self._model.nbytes

    def told(self) -> dict[str, dict[str, int]]:
        """The counts as plain data, without kinds that are not used."""
        unused: set[DraftKind] = {"model"} if self._model is None else set()
        if not self._uses_lookup:
            unused.add("ngram")
        return {kind: asdict(counts) for kind, counts in self.counts.items() if kind not in unused}

    def _looked_up(self, asks: Seq[Ask], tokens: int, budget: int, slots: Slots) -> list[list[int]]:
        """Drafts of prompt lookup alone, sequence by sequence."""
        drafts = []
        for ask in asks:
            draft: list[int] = []
            if (most := min(ask.most, budget)) > 0:
                draft = _possible(ask.seq, self._lookup.propose(ask.seq, most, tokens))
                draft = draft[: slots(ask.seq, len(draft))]
                tokens, budget = tokens + len(draft), budget - len(draft)
                self._drafted[ask.seq] = "ngram"
            drafts.append(draft)
        return drafts

    def _choose(self, asks: Seq[Ask], tokens: int, budget: int) -> list[tuple[DraftKind, int]]:
        if self._kind == "draft":
            return _share(asks, budget)
        offers = [self._offer(ask) for ask in asks]
        costs = DraftCosts(self._steps.of, self._passes.of)
        chosen = choose_drafts(offers, costs, tokens, budget)
        if self._model is None:
            return chosen
        if any(kind == "model" and count for kind, count in chosen):
            self._waited, self._wait = 0, LEAST_WAIT
            return chosen
        self._waited += 1
        if self._waited <= self._wait:
            return chosen
        if self._trials >= TRIALS:
            self._waited, self._wait = 0, min(max(2 * self._wait, LEAST_WAIT), MOST_WAIT)
        return _share(asks, budget)

    def _offer(self, ask: Ask) -> Offer:
        if ask.most <= 0:
            return Offer(0)
        found, likely = len(self._lookup.peek(ask.seq, ask.most)), self._lookup.acceptance(ask.seq)
        if self._model is None or self._trials < TRIALS:
            return Offer(ask.most, found, likely)  # nothing is known of the model yet
        # What a long prompt costs the model is spread over the steps that are to come.
        behind = self._model.behind(ask.seq)
        to_come = max(self._usual_output - ask.seq.num_output, LEAST_TO_COME)
        catch_up = self._passes.of(behind) / to_come if behind > self._most + 1 else 0.0
        return Offer(ask.most, found, likely, self._acceptance.get(ask.seq, self._usual), catch_up)

    def _collect(self, asks: Seq[Ask], chosen: Seq[tuple[DraftKind, int]], slots: Slots) -> list[list[int]]:
        """Fetch what was chosen, as far as there is room for it."""
        drafts: list[list[int]] = [[] for _ in asks]
        drafting: list[int] = []
        room: list[int] = []
        for i, (ask, (kind, count)) in enumerate(zip(asks, chosen, strict=True)):
            if count <= 0:
                continue
            self._drafted[ask.seq] = kind
            if kind == "ngram":
                draft = _possible(ask.seq, self._lookup.peek(ask.seq, count))
                drafts[i] = draft[: slots(ask.seq, len(draft))]
            elif (most := slots(ask.seq, count)) > 0:
                drafting.append(i)
                room.append(most)
        if drafting:
            assert self._model is not None, "nothing of it was chosen"
            proposed = self._model.propose([asks[i].seq for i in drafting], room)
            self._trials += any(proposed)
            for i, draft in zip(drafting, proposed, strict=True):
                drafts[i] = _possible(asks[i].seq, draft)
            for each in self._model.passes:
                self._passes.note(each.tokens, each.seconds)
                self._drafting_s += each.seconds
        return drafts


def _possible(seq: Sequence, draft: list[int]) -> list[int]:
    """Its leading tokens that the sequence's grammar allows."""
    return draft if seq.constraint is None else draft[: seq.constraint.num_possible(draft)]


def _share(asks: Seq[Ask], budget: int) -> list[tuple[DraftKind, int]]:
    """As many drafts of the model as each sequence may have, the first ones first."""
    chosen: list[tuple[DraftKind, int]] = []
    for ask in asks:
        count = max(min(ask.most, budget), 0)
        budget -= count
        chosen.append(("model", count))
    return chosen
