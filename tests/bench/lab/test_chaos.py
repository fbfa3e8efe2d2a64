"""What the chaos bench makes of answers and kills; the kills themselves need a server of their own."""

from __future__ import annotations

import pytest

from moe_ray.bench.lab.chaos import stalls_ms
from moe_ray.bench.lab.storm import StormAnswer, changed_tokens


def answer(prompt: int, tokens: str, *arrivals: float, started: float = 0.0) -> StormAnswer:
    return StormAnswer(prompt, started, list(tokens), list(arrivals))


def test_changed_tokens_are_counted_one_by_one() -> None:
    calm = {0: list("abcd"), 1: list("wxyz")}
    assert changed_tokens([answer(0, "abcd"), answer(1, "wxyz"), answer(0, "abcd")], calm) == 0
    assert changed_tokens([answer(0, "abXd"), answer(1, "AAyz")], calm) == 3
    assert changed_tokens([answer(0, "ab")], calm) == 0, "a failed answer is counted as failed"
    assert changed_tokens([answer(1, "abcd")], calm) == 4


def test_a_stall_is_the_gap_that_a_kill_fell_into() -> None:
    one = answer(0, "abc", 1.0, 1.01, 1.5)
    late = answer(1, "ab", 3.0, 3.1, started=2.9)
    assert stalls_ms([one, late], [1.2]) == [pytest.approx(490)]
    assert stalls_ms([one, late], [0.5]) == [pytest.approx(1000)], "waiting for the first token is a stall too"
    assert stalls_ms([one, late], [1.005, 3.05]) == [pytest.approx(10), pytest.approx(100)]
    assert stalls_ms([one, late], [2.0]) == [], "nobody was waiting"
