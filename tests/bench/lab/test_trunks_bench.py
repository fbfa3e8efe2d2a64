"""`bench trunks`: what it counts, and what several trunks' calls computed together are worth."""

from __future__ import annotations

import pytest

from moe_ray.bench.lab import trunks
from moe_ray.bench.lab.trunks import Counts, Turn, batch_row, emulated_rows, expert_counts, talk_row
from moe_ray.config import load_config


def test_counts_are_of_experts_alone() -> None:
    one = {"calls": 10, "batches": 8, "rows": 30, "busy_s": 0.5}
    actors = {"Expert0": [one, one], "Experts4-5": [one], "Spare0": [one], "Trunk": [{"generated_tokens": 3}]}
    assert expert_counts(actors) == Counts(40, 32, 120, 2.0)
    assert batch_row(expert_counts(actors) - Counts(20, 16, 60, 1.0), 4.0) == {
        "calls": 20,
        "batches": 16,
        "rows_per_call": 3.0,
        "calls_per_batch": 1.25,
        "rows_per_batch": 3.75,
        "experts_busy": 0.25,
    }


def test_first_turns_know_nothing() -> None:
    turns = [Turn(0, 100, 64, 0, 9.0), Turn(1, 120, 60, 100, 0.2), Turn(2, 140, 70, 120, 0.3)]
    row = talk_row(turns)
    assert (row["turns"], row["cached_share"], row["known_share"]) == (2, 0.5, round(220 / 260, 3))
    assert row["answer_p99_ms"] == pytest.approx(300, rel=0.01)


@pytest.mark.slow
def test_together_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "EMULATED_S", 2.0)
    monkeypatch.setattr(trunks, "EMULATED_WARM_S", 1.5)
    alone, together = emulated_rows((6,), load_config().cache_dir, lambda *_: None)
    assert (alone["trunks"], alone["batched"], together["batched"]) == (6, False, True)
    assert alone["calls_per_batch"] == 1.0
    assert float(together["calls_per_batch"] or 0) > 1.1
    assert float(together["rows_per_batch"] or 0) > float(alone["rows_per_batch"] or 0)
