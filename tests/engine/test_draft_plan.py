"""Which drafts pay: decided from times and acceptance alone, and so tried with any."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import pytest

from moe_ray.core import Request, SamplingParams, Sequence
from moe_ray.engine.draft_model import DraftPass
from moe_ray.engine.draft_plan import DraftCosts, Offer, PassTimes, choose_drafts
from moe_ray.engine.drafting import MOST_WAIT, Ask, Drafting
from moe_ray.engine.drafts import StepCosts
from moe_ray.engine.scheduler import SchedulerLimits

MIXTRAL = StepCosts(num_experts=8, experts_per_token=2)


def costs(draft: float) -> DraftCosts:
    """A target whose next token costs a quarter of a step, and a draft model that takes this share of one."""
    return DraftCosts(lambda tokens: 1.0 + 0.25 * (tokens - 1), lambda tokens: draft * (1 + 0.1 * (tokens - 1)))


def test_times_are_those_that_were_measured_and_scaled_between() -> None:
    times = PassTimes(lambda tokens: 1.0 + tokens)
    assert not times.known
    assert times.of(3) == 4.0
    for _ in range(9):
        times.note(1, 0.2)
        times.note(9, 2.0)
    times.note(9, 99.0)  # something disturbed it
    assert times.known
    assert times.of(1) == pytest.approx(0.2)
    assert times.of(9) == pytest.approx(2.0)
    assert times.of(5) == pytest.approx(6 * 0.15), "half way between 0.1 and 0.2 of the shape"
    assert times.of(100) == pytest.approx(101 * 0.2)
    assert PassTimes(lambda _: 1.0).of(10**6) == 1.0


def test_old_times_are_forgotten() -> None:
    times = PassTimes(lambda tokens: 1.0)
    for seconds in [1.0] * 9 + [3.0] * 5:
        times.note(4, seconds)
    assert times.of(4) == 3.0


def test_a_cheap_model_that_is_right_is_asked_for_all() -> None:
    offers = [Offer(most=4, model_acceptance=0.95)]
    assert choose_drafts(offers, costs(0.1), 1, 100) == [("model", 4)]
    assert choose_drafts(offers, costs(0.1), 1, 2) == [("model", 2)], "the step has room for no more"
    assert choose_drafts(offers, costs(0.8), 1, 100) == [("ngram", 0)], "as slow as the target"
    assert choose_drafts([Offer(4, model_acceptance=0.2)], costs(0.1), 1, 100) == [("ngram", 0)]
    assert choose_drafts([Offer(4, model_acceptance=0.95, catch_up=5.0)], costs(0.1), 1, 100) == [("ngram", 0)]


def test_what_was_looked_up_costs_no_pass() -> None:
    offers = [Offer(most=4, found=4, lookup_acceptance=0.9, model_acceptance=0.9)]
    assert choose_drafts(offers, costs(0.1), 1, 100) == [("ngram", 4)]
    beside = [*offers, Offer(most=4, model_acceptance=0.9)]
    assert choose_drafts(beside, costs(0.1), 2, 100) == [("ngram", 4), ("model", 2)], "two passes for one of two"


def test_sequences_that_do_not_decode_have_none() -> None:
    offers = [Offer(0), Offer(2, model_acceptance=0.99), Offer(0)]
    assert choose_drafts(offers, costs(0.05), 3, 100) == [("ngram", 0), ("model", 2), ("ngram", 0)]
    assert choose_drafts([], costs(0.1), 1, 10) == []


def test_the_choice_is_the_best_of_all_equal_ones() -> None:
    """Against every number of drafts and passes, where all sequences are alike."""
    rng = random.Random(0)
    for _ in range(200):
        count, most, acceptance = rng.randint(1, 6), rng.randint(1, 5), rng.random()
        weighed = costs(rng.choice([0.02, 0.1, 0.3]))
        offers = [Offer(most, model_acceptance=acceptance) for _ in range(count)]
        chosen = choose_drafts(offers, weighed, count, 100)

        def rate(total: int, passes: int, a: float = acceptance, n: int = count, c: DraftCosts = weighed) -> float:
            likely = sorted((a**d for d in range(1, passes + 1) for _ in range(n)), reverse=True)
            spent = c.step(n + total) + passes * c.draft(n) * (total > 0)
            return (n + sum(likely[:total])) / spent

        best = max(rate(total, passes) for passes in range(1, most + 1) for total in range(passes * count + 1))
        total, passes = sum(n for _, n in chosen), max(n for _, n in chosen)
        assert max(rate(total, each) for each in range(max(passes, 1), most + 1)) >= best / 1.03 - 1e-9


def test_choosing_takes_a_small_share_of_a_large_step() -> None:
    times = PassTimes(MIXTRAL.of)
    for tokens in (1, 2, 5, 8, 64, 128, 320):
        times.note(tokens, 0.01 * MIXTRAL.of(tokens))
    offers = [Offer(4, 4, 0.5, 0.8) for _ in range(64)]
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        choose_drafts(offers, DraftCosts(times.of, times.of), 64, 512)
        best = min(best, time.perf_counter() - started)
    assert best < 0.02


@dataclass
class Oracle:
    """A draft model that is right with a given chance, and whose passes take a given time."""

    acceptance: float
    seconds: float
    nbytes: int = 0
    passes: list[DraftPass] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        self.passes = [DraftPass(len(sequences), self.seconds) for _ in range(max(counts))]
        right = [[self.rng.random() < self.acceptance for _ in range(count)] for count in counts]
        return [[1 if each else 0 for each in row] for row in right]

    def behind(self, seq: Sequence) -> int:
        return 1

    def drop(self, seq: Sequence) -> None:
        pass


def drive(model: Oracle, streams: int, steps: int) -> tuple[float, float]:
    """Drive the choice through steps whose time is known; (tokens per time, the same without drafts)."""
    drafting = Drafting(SchedulerLimits(num_speculative_tokens=4, speculation="auto"), MIXTRAL, model)
    # Tokens that never repeat: prompt lookup has nothing.
    seqs = [Sequence(Request(f"r{i}", (10,), SamplingParams()), [10]) for i in range(streams)]
    fresh = iter(range(100, 10**9))
    clock, tokens, late_clock, late_tokens = 0.0, 0, 0.0, 0
    for step in range(steps):
        drafts = drafting.propose([Ask(seq, 4) for seq in seqs], streams, 512, lambda seq, count: count)
        spent = 0.01 * MIXTRAL.of(streams + sum(map(len, drafts)))
        spent += sum(each.seconds for each in model.passes)
        model.passes = []
        for seq, draft in zip(seqs, drafts, strict=True):
            accepted = next((i for i, each in enumerate(draft) if each != 1), len(draft))
            new = [next(fresh) for _ in range(accepted + 1)]
            drafting.learn(seq, new)
            seq.token_ids += new
            drafting.count(seq, len(draft), accepted)
            tokens += accepted + 1
            late_tokens += (accepted + 1) * (step > steps // 2)
        drafting.note_step(streams + sum(map(len, drafts)), spent)
        clock += spent
        late_clock += spent * (step > steps // 2)
    return late_tokens / late_clock, streams / (0.01 * MIXTRAL.of(streams))


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("seconds", [0.001, 0.008, 0.03])
def test_auto_is_not_slower_than_none_and_faster_where_it_can_be(
    streams: int, acceptance: float, seconds: float
) -> None:
    speed, plain = drive(Oracle(acceptance, seconds), streams, 1500)
    assert speed > 0.97 * plain
    if acceptance >= 0.9 and seconds == 0.001:
        assert speed > 1.3 * plain


def test_trials_become_rare_where_they_fail() -> None:
    model = Oracle(0.0, 0.05)
    calls = []
    drafting = Drafting(SchedulerLimits(num_speculative_tokens=4, speculation="auto"), MIXTRAL, model)
    seq = Sequence(Request("r", (10,), SamplingParams()), [10])
    for step in range(3 * MOST_WAIT):
        (draft,) = drafting.propose([Ask(seq, 4)], 1, 512, lambda seq, count: count)
        calls += [step] * bool(draft)
        drafting.learn(seq, [1000 + step])
        seq.token_ids.append(1000 + step)
        drafting.count(seq, len(draft), 0)
        drafting.note_step(1 + len(draft), 0.01)
    assert len(calls) < 12
    gaps = [b - a for a, b in itertools.pairwise(calls[3:])]
    assert gaps == sorted(gaps), "each wait is as long as the one before, or longer"
    assert drafting.told()["model"] == {"drafted": 4 * len(calls), "accepted": 0}
