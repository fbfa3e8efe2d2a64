"""Prompt lookup: the index against a search through the whole list; when a draft is worth its experts."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from moe_ray.core import Request, SamplingParams, Sequence
from moe_ray.engine.drafts import Drafter, NgramIndex, StepCosts, num_accepted

MIXTRAL = StepCosts(num_experts=8, experts_per_token=2)


def search(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """What the index must propose, found by looking everywhere."""
    for n in range(longest, shortest - 1, -1):
        for position in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[position - n : position] == tokens[-n:]:
                whole = list(tokens)
                for i in range(count):
                    whole.append(whole[position + i])
                return whole[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(60))
def test_the_index_finds_what_a_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    longest = rng.randint(shortest, 5)
    index = NgramIndex(shortest, longest)
    tokens: list[int] = []
    found = 0
    for _ in range(120):
        tokens += [rng.randrange(rng.choice([2, 3, 8])) for _ in range(rng.randint(1, 4))]
        while index.extend(tokens, rng.randint(1, 5)):
            pass
        count = rng.randint(1, 6)
        proposed = index.propose(tokens, count)
        assert proposed == search(tokens, shortest, longest, count)
        found += bool(proposed)
    assert found > 30


def test_a_loop_is_drafted_as_a_loop() -> None:
    index = NgramIndex(2, 4)
    tokens = [9, 8, 1, 2, 3, 1, 2]
    index.extend(tokens, 100)
    assert index.propose(tokens, 7) == [3, 1, 2, 3, 1, 2, 3]


def test_indexing_is_bounded_by_step_and_done_once() -> None:
    index = NgramIndex(2, 4)
    tokens = list(range(100))
    taken = []
    while not taken or taken[-1]:
        taken.append(index.extend(tokens, 30))
    assert taken == [30, 30, 30, 8, 0]  # the first two tokens follow no bigram
    tokens.append(5)
    assert index.extend(tokens, 30) == 1


def test_a_step_costs_the_same_however_long_the_context_is() -> None:
    def cost(length: int) -> float:
        index = NgramIndex(2, 4)
        rng = random.Random(0)
        tokens = [rng.randrange(1000) for _ in range(length)]
        index.extend(tokens, length)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(200):
                tokens.append(rng.randrange(1000))
                index.extend(tokens, 4)
                index.propose(tokens, 4)
            best = min(best, time.perf_counter() - start)
        return best

    assert cost(32_000) < 10 * cost(500), "some work grows with the context (64 times as long)"


def test_num_accepted_against_all_short_cases() -> None:
    for length in range(4):
        for draft in itertools.product(range(2), repeat=length):
            for sampled in itertools.product(range(2), repeat=length + 1):
                equal = [a == b for a, b in zip(draft, sampled, strict=False)]
                wanted = equal.index(False) if False in equal else length
                assert num_accepted(draft, sampled) == wanted


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64, 512])
def test_more_is_drafted_the_more_is_accepted(tokens: int) -> None:
    lengths = [MIXTRAL.draft_length(a / 50, 8, tokens) for a in range(51)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 8)
    assert MIXTRAL.draft_length(1.0, 0, tokens) == 0


def test_the_arithmetic_of_a_lone_sequence() -> None:
    """A draft reads 1.5 experts more than the 2 of one token: it must come true about every other time."""
    assert MIXTRAL.of(2) - MIXTRAL.of(1) == pytest.approx(1.5 + 0.1)
    assert MIXTRAL.draft_length(0.45, 4, 1) == 0
    assert 1 <= MIXTRAL.draft_length(0.6, 4, 1) <= 2
    assert MIXTRAL.draft_length(0.9, 4, 1) == 4
    assert MIXTRAL.draft_length(0.3, 4, 16) > 0, "beside others nearly all experts are read anyway"
    assert MIXTRAL.draft_length(0.7, 4, 512) == 0, "beside a long prefill a draft displaces work that is certain"


def test_other_numbers_of_experts_are_other_costs() -> None:
    assert MIXTRAL.of(3) == pytest.approx(1 + 8 * (1 - 0.75**3) + 0.3)
    dense = StepCosts(num_experts=1, experts_per_token=1)
    assert dense.of(5) - dense.of(1) == pytest.approx(4 * 0.05), "one expert is read once, whatever the tokens"
    assert dense.draft_length(0.2, 4, 1) > 0, "where no further expert is read a draft costs its arithmetic alone"
    many = StepCosts(num_experts=128, experts_per_token=8)
    assert many.of(2) - many.of(1) == pytest.approx(8 * (1 - 8 / 128) + 8 * 0.05)
    assert many.draft_length(0.8, 4, 1) == 0, "nearly all experts of a draft are further ones"


def run(drafter: Drafter, seq: Sequence, upcoming: list[int]) -> list[int]:
    """Drafts verified at each step while `upcoming` is generated, one token a step."""
    lengths = []
    for token in upcoming:
        drafter.extend(seq, 10**6)
        lengths.append(len(drafter.propose(seq, 4, 1)))
        drafter.learn(seq, [token])
        seq.token_ids.append(token)
    return lengths


def test_drafting_ends_where_it_fails_and_begins_again_where_it_would_succeed() -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(2) for _ in range(200)]  # every bigram is known, and what follows is a coin toss
    drafter = Drafter(2, 4, MIXTRAL)
    seq = Sequence(Request("r", tuple(prompt), SamplingParams()), list(prompt))
    drafter.extend(seq, 10**6)
    wrong = []
    for _ in range(12):
        drafter.extend(seq, 10**6)
        wrong.append(len(drafter.propose(seq, 4, 1)))
        token = 1 - drafter._known[seq].index.propose(seq.token_ids, 1)[0]
        drafter.learn(seq, [token])
        seq.token_ids.append(token)
    assert wrong[0] > 0
    assert sum(wrong) <= 4, "few experts are read for nothing"
    assert wrong[-1] == 0
    right = run(drafter, seq, [0, 1] * 40)
    assert right[-1] == 4
    drafter.drop(seq)
    assert not drafter._known
    drafter.drop(seq)
