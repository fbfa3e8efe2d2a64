"""What the tests compare with: a guess of transformers' greedy tokens saves time, and changes none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from reference import Reference

PROMPT, MAX_TOKENS = list(range(40, 60)), 12


@pytest.mark.parametrize(
    "guess",
    [
        lambda right: right,
        lambda right: right[:5],
        lambda right: [*right, 9, 9],
        lambda right: [*right[:4], (right[4] + 1) % 512, *right[5:]],
        lambda right: [(right[0] + 1) % 512],
    ],
    ids=["right", "short", "long", "wrong in the middle", "wrong"],
)
def test_a_guess_changes_no_token(
    random_model: Path, random_reference: Reference, guess: Callable[[list[int]], list[int]]
) -> None:
    greedy = random_reference.greedy(PROMPT, MAX_TOKENS)
    assert len(greedy) == MAX_TOKENS
    fresh = Reference(random_model)
    assert fresh.greedy(PROMPT, MAX_TOKENS, guess(greedy)) == greedy


def test_the_end_of_a_sequence_ends_it(random_model: Path, random_reference: Reference) -> None:
    greedy, fresh = random_reference.greedy(PROMPT, MAX_TOKENS), Reference(random_model)
    end = next(token for at, token in enumerate(greedy) if at > 2 and token not in greedy[:at])
    fresh._model.generation_config.eos_token_id = end
    expected = greedy[: greedy.index(end) + 1]
    assert fresh.greedy(PROMPT, MAX_TOKENS, greedy) == expected
    assert fresh.greedy(PROMPT, MAX_TOKENS + 1) == expected
