"""Engines whose rows go to their experts through the memory of a card: the tokens of one process, whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_mixtral import SMALL, save_random_mixtral
from spread import Placement, Spread
from stepping import events_of

from moe_ray.core import Request, SamplingParams

PROMPTS = [[5, 7, 11], [(3 + 5 * i) % 90 + 3 for i in range(200)], [(1 + 7 * i) % 90 + 3 for i in range(13)]]
"""One chunk of the second has more rows for an expert than a slot."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("card") / "model", seed=3, **SMALL)


def engine_of(directory: Path, placement: Placement, micro_batches: int = 1) -> Spread:
    settings = {
        "model": {"dtype": "float32", "device": "cpu", "kernels": "torch"},
        "engine": {"kv_cache_tokens": 1024, "micro_batches": micro_batches, "enable_prefix_caching": False},
    }
    return Spread(directory, settings, placement)


def answers(spread: Spread, lose_at: int | None = None) -> dict[str, list[int]]:
    """Greedy answers; a replica is lost before step `lose_at`."""

    def before_step(step: int) -> None:
        if step == lose_at:
            spread.lose(0)

    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    requests = [Request(f"p{i}", tuple(prompt), sampling) for i, prompt in enumerate(PROMPTS)]
    found = events_of(spread.engine, requests, before_step=before_step)
    return {name: [token for event in events for token in event.token_ids] for name, events in found.items()}


@pytest.fixture(scope="module")
def wanted(model: Path) -> dict[str, list[int]]:
    spread = engine_of(model, Placement())
    try:
        return answers(spread)
    finally:
        spread.close()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tokens_are_those_of_one_process(model: Path, wanted: dict[str, list[int]], micro_batches: int) -> None:
    spread = engine_of(model, Placement("socket", ((0, 1), (1,), (2, 0)), card=True), micro_batches)
    try:
        assert answers(spread) == wanted
        assert len(spread.devices) == 4
        trunk, *replicas = [device.copies for device in spread.devices]
        calls = sum(replicas)  # each copies its reply
        assert calls > 20
        assert trunk == 3 * calls, "rows, weights and reply of each call"
    finally:
        spread.close()


def test_tokens_are_the_same_when_a_replica_is_lost(model: Path, wanted: dict[str, list[int]]) -> None:
    spread = engine_of(model, Placement("socket", ((0, 1), (1,), (2, 0)), card=True))
    try:
        assert answers(spread, lose_at=3) == wanted
    finally:
        spread.close()
