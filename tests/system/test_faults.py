"""Processes really killed, in mid-stream: clients see a pause and then the very tokens they would have had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served import Served, complete, eventually, kill, statuses, wait_ready


def busiest_expert(served: Served) -> tuple[str, int]:
    """Name and pid of the expert with the most rows so far: killing it is sure to be felt."""
    rows = {name: statuses(served, name)[0] for name in (f"Expert{e}" for e in range(8))}
    name = max(rows, key=lambda each: rows[each]["rows"])
    return name, rows[name]["pid"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 11}], ids=["greedy", "seeded"])
def test_an_expert_is_killed_in_mid_stream(served_demo: Served, sampling: dict[str, Any]) -> None:
    undisturbed = complete(served_demo, "The old lighthouse keeper", **sampling)
    name, pid = busiest_expert(served_demo)
    assert (
        complete(served_demo, "The old lighthouse keeper", lambda n: kill(pid) if n == 5 else None, **sampling)
        == undisturbed
    )
    (replacement,) = statuses(served_demo, name)
    assert replacement["pid"] != pid
    wait_ready(served_demo.url)


def test_health_names_the_expert_that_is_away(served_demo: Served) -> None:
    (expert,) = statuses(served_demo, "Expert5")
    kill(expert["pid"])
    deadline, seen = time.monotonic() + 30, httpx.get(f"{served_demo.url}/health", trust_env=False)
    while seen.status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.05)
        seen = httpx.get(f"{served_demo.url}/health", trust_env=False)
    assert (seen.status_code, seen.json()["missing"]) == (503, ["Expert5"])
    wait_ready(served_demo.url)
    assert complete(served_demo, "Once upon a time", max_tokens=3)


def test_the_trunk_is_killed_under_eight_streams(served_demo: Served) -> None:
    prompts = [f"Chapter {i}. It was a" for i in range(8)]
    sampling = [{"temperature": 0.8, "seed": i} if i % 2 else {} for i in range(8)]

    def ask_all(on_chunk: Callable[[int], None] | None) -> list[str]:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda i: complete(served_demo, prompts[i], on_chunk, **sampling[i]), range(8)))

    undisturbed = ask_all(None)
    (trunk,) = statuses(served_demo, "Trunk")
    once = threading.Lock()

    def kill_once(chunks: int) -> None:
        if chunks == 6 and once.acquire(blocking=False):
            kill(trunk["pid"])

    assert ask_all(kill_once) == undisturbed
    assert once.locked()
    wait_ready(served_demo.url)


def test_of_two_replicas_one_is_killed(served_random: Served) -> None:
    first, second = statuses(served_random, "Expert3")
    prompt = list(range(3, 60))
    before = complete(served_random, prompt)

    def both_take_calls() -> bool:
        """On a busy machine one of them may look slow for a while, and is spared."""
        complete(served_random, prompt)
        calls = {s["replica_id"]: s["calls"] for s in statuses(served_random, "Expert3")}
        return all(calls[s["replica_id"]] > s["calls"] for s in (first, second))

    eventually(both_take_calls, timeout_s=60)
    slowest, last = 0.0, time.perf_counter()

    def watch(chunks: int) -> None:
        nonlocal slowest, last
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
        if chunks == 5:
            kill(first["pid"])

    assert complete(served_random, prompt, watch) == before
    assert slowest < 2.0, "the other replica answers at once, without waiting for a replacement"
