"""A replica that is told to go: how long it serves on. No Ray: who is there is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from moe_ray.core import ReplicaInfo
from moe_ray.deploy import peers
from moe_ray.deploy.peers import wait_for_successor
from moe_ray.errors import NotReady


def info(name: str, loading: bool = False) -> ReplicaInfo:
    return ReplicaInfo(name, "node", 1, frozenset({(0, 0)}), 8, "float32", {}, loading=loading)


def course(*steps: tuple[float, Sequence[ReplicaInfo]]) -> Callable[[], Sequence[ReplicaInfo]]:
    """Who answers: each list until so many seconds have passed."""
    began = time.monotonic()

    def find() -> Sequence[ReplicaInfo]:
        passed = time.monotonic() - began
        found = next(who for until, who in steps if passed < until)
        if not found:
            raise NotReady("nobody")
        return found

    return find


def waited(find: Callable[[], Sequence[ReplicaInfo]], ending: Callable[[], bool], at_most_s: float = 10.0) -> float:
    began = time.monotonic()
    wait_for_successor(find, ending, "me", at_most_s)
    return time.monotonic() - began


def never() -> bool:
    return False


ME, READY, LOADING = info("me"), info("other"), info("other", loading=True)


def test_it_goes_at_once_where_another_holds_the_same() -> None:
    assert waited(course((99, [ME, READY])), never) < 0.1


def test_it_waits_until_its_successor_has_come_and_loaded() -> None:
    find = course((0.4, []), (0.8, [ME]), (1.2, [ME, LOADING]), (99, [READY]))
    assert 1.1 < waited(find, never) < 2.0


def test_it_goes_at_once_where_the_application_ends() -> None:
    assert waited(course((99, [])), lambda: True) < 0.1


def test_it_goes_when_the_application_ends_meanwhile() -> None:
    end = time.monotonic() + 0.5
    assert 0.3 < waited(course((99, [])), lambda: time.monotonic() > end) < 1.5


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.4 < waited(course((99, [ME, LOADING])), never, at_most_s=0.5) < 1.5
    assert 0.4 < waited(course((99, [ME])), never, at_most_s=0.5) < 1.5
    monkeypatch.setattr(peers, "SUCCESSOR_S", 0.3)
    assert waited(course((99, [])), never) < 1.0, "the card that the other one waits for may be ours"
