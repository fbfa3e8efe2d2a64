"""Two trunks that share the experts: conversations stay where they are known, trunks come and go unnoticed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from served import Served, by_hand, deploy, eventually, kill, statuses

from moe_ray.core import Request, SamplingParams
from moe_ray.deploy.replica_targets import TRUNK
from moe_ray.errors import ConfigError

BLOCK = 16
QUICK = {
    "enabled": True,
    "target_waiting": 0.5,
    "up_after_s": 0.5,
    "down_after_s": 2,
    "interval_s": 0.5,
    "look_back_s": 2,
}
"""A third trunk comes when more than eight requests at once last; the other tests send fewer."""


@pytest.fixture(scope="module")
def two(served_random: Served, http_port: int) -> Iterator[Served]:
    """The model of `served_random` under two trunks; four experts an actor, so that there are few processes."""
    from ray import serve

    flags = {
        "model": {"path": served_random.config.model.path, "served_name": "random"},
        "engine": {"kv_cache_gib": 0.05, "block_size": BLOCK, "max_num_seqs": 8},
        "experts": {"experts_per_actor": 4},
        "trunk": {"num_replicas": 2, "min_replicas": 2, "max_replicas": 3, "drain_s": 1.0, "autoscale": QUICK},
    }
    yield deploy("trunks", http_port, flags)
    serve.delete("trunks")


def trunks(served: Served) -> dict[str, dict[str, Any]]:
    return {status["replica_id"]: status for status in statuses(served, "Trunk")}


def who_generated(served: Served, work: Callable[[], Any]) -> tuple[set[str], Any]:
    """The trunks that generated tokens meanwhile, and what `work` returned."""
    before = {each: status["generated_tokens"] for each, status in trunks(served).items()}
    result = work()
    after = trunks(served)
    return {each for each, status in after.items() if status["generated_tokens"] > before.get(each, 0)}, result


def ask(served: Served, prompt: list[int], **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0, **options}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def linked(served: Served) -> None:
    """Wait until the gateway reaches every trunk: new prompts sent at once go to all of them."""
    count, salt = len(trunks(served)), iter(range(3, 500))

    def all_answer() -> bool:
        prompts = [[next(salt)] * 20 for _ in range(2 * count)]
        with ThreadPoolExecutor(2 * count) as threads:
            found, _ = who_generated(served, lambda: list(threads.map(lambda p: ask(served, p), prompts)))
        return len(found) == count

    eventually(all_answer, 15)


def test_a_conversation_goes_on_where_it_began(two: Served) -> None:
    """Over the gateway's own `Sessions`, so that the history has every token of every answer."""
    from ray import serve

    from moe_ray.deploy.discovery import discover_trunks
    from moe_ray.deploy.link_options import link_options
    from moe_ray.gateway.sessions import Sessions

    handle = serve.get_deployment_handle("Trunk", two.app_name)
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)

    async def turn(sessions: Sessions, name: str, history: list[int]) -> int:
        """Append an answer to `history`; returns how many of its tokens were cached."""
        session, cached = sessions.open([(0, Request(name, tuple(history), sampling))]), 0
        while (told := await session.next(30)) is not None:
            event = told[1]
            assert event.error is None
            history += event.token_ids
            cached = event.num_cached_tokens
            if event.last:
                return cached
        raise AssertionError("no event in 30 s")

    async def talk() -> None:
        sessions = Sessions(discover_trunks(handle), link_options(two.config))
        sessions.start()
        while len(sessions.trunks) < 2:
            await asyncio.sleep(0.05)
        histories = [list(range(first, first + 90)) for first in (10, 110, 210, 310)]
        places: list[list[str]] = [[] for _ in histories]
        for number in range(3):
            for which, history in enumerate(histories):
                known = len(history) - 30 if number else 0
                before = {each: s["generated_tokens"] for each, s in (await asyncio.to_thread(trunks, two)).items()}
                cached = await turn(sessions, f"{which}-{number}", history)
                after = await asyncio.to_thread(trunks, two)
                (place,) = [each for each, s in after.items() if s["generated_tokens"] > before[each]]
                places[which].append(place)
                # The last token of an answer is never computed; what follows the last full block neither is there.
                assert cached == (known - 1) // BLOCK * BLOCK if number else cached == 0
                history += [400 + number] * 30
        assert all(len(set(each)) == 1 for each in places), places

    asyncio.run(asyncio.wait_for(talk(), 60))


def test_conversations_over_http_spread_and_stay(two: Served) -> None:
    linked(two)
    prompts = [[50 + which, *range(300, 396)] for which in range(6)]
    with ThreadPoolExecutor(6) as threads:  # all at once: to the one with fewer requests
        found, _ = who_generated(two, lambda: list(threads.map(lambda prompt: ask(two, prompt), prompts)))
    assert len(found) == 2
    for number in range(2):
        for which, before in enumerate(prompts):
            prompts[which] = [*before, *range(20 + number, 60 + number)]
            usage = ask(two, prompts[which])["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == len(before) // BLOCK * BLOCK


def test_answers_to_one_prompt_go_together(two: Served) -> None:
    linked(two)
    for first in range(100, 104):
        found, answer = who_generated(two, lambda first=first: ask(two, [first] * 40, n=4, temperature=0.8, seed=1))
        assert (len(answer["choices"]), len(found)) == (4, 1)


class Crowd:
    """Greedy streams, one per prompt at a time, over and over; every answer is compared with the calm one."""

    def __init__(self, served: Served, count: int = 4, tokens: int = 150) -> None:
        self._served, self._tokens = served, tokens
        self._prompts = [[60 + i, *range(200, 230)] for i in range(count)]
        with ThreadPoolExecutor(count) as threads:
            self._calm = list(threads.map(self._ask, self._prompts))
        self._stop = threading.Event()
        self.answers = self.changed = 0

    def _ask(self, prompt: list[int]) -> list[str]:
        """The tokens themselves: text could hide a changed one."""
        tokens: list[str] = []
        body = {"prompt": prompt, "stream": True, "max_tokens": self._tokens, "ignore_eos": True, "temperature": 0}
        url = f"{self._served.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "logprobs": 0}, timeout=60, trust_env=False) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    tokens += (chunk["choices"][0].get("logprobs") or {}).get("tokens", ())
        assert len(tokens) == self._tokens
        return tokens

    def _again(self, which: int) -> None:
        while not self._stop.is_set():
            changed = self._ask(self._prompts[which]) != self._calm[which]
            self.answers, self.changed = self.answers + 1, self.changed + changed

    def __enter__(self) -> Crowd:
        self._threads = ThreadPoolExecutor(len(self._prompts))
        self._running = [self._threads.submit(self._again, which) for which in range(len(self._prompts))]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._running:
            each.result()  # raises what a stream raised
        self._threads.shutdown()


def test_a_trunk_goes_and_another_comes_under_streams(two: Served) -> None:
    others = pids_of_experts(two)
    with Crowd(two) as crowd:
        for replicas in (1, 2):
            assert "Trunk" in by_hand(two, [TRUNK], replicas)
            assert len(trunks(two)) == replicas
        started, seen = time.monotonic(), crowd.answers
        eventually(lambda: all(status["generated_tokens"] > 0 for status in trunks(two).values()), 20)
        eventually(lambda: crowd.answers >= seen + 4, 20)
    assert crowd.answers >= 4
    assert crowd.changed == 0
    assert time.monotonic() - started < 30
    assert pids_of_experts(two) == others
    by_hand(two, [TRUNK], None)
    assert len(trunks(two)) == two.config.trunk.num_replicas


def test_a_queue_brings_a_trunk_and_quiet_takes_it_away(two: Served) -> None:
    with Crowd(two, count=24, tokens=100) as crowd:
        eventually(lambda: len(trunks(two)) == 3, 40)
        three = {status["pid"] for status in trunks(two).values()}
    assert crowd.changed == 0
    eventually(lambda: len(trunks(two)) == 2, 40)
    # Serve no longer counts a trunk that goes, but until it says so itself the gateway may send it a request.
    (gone,) = three - {status["pid"] for status in trunks(two).values()}
    eventually(lambda: not psutil.pid_exists(gone), 40)


def pids_of_experts(served: Served) -> dict[str, set[int]]:
    names = ("Gateway", "Experts0-3", "Experts4-7")
    return {name: {status["pid"] for status in statuses(served, name)} for name in names}


def test_what_cannot_be_asked_for(two: Served) -> None:
    with pytest.raises(ConfigError, match=r"17 replicas: must be 1 to 16 \(`trunk.max_replicas_by_hand`\)"):
        by_hand(two, [TRUNK], 17)
    with pytest.raises(ConfigError, match="no expert 8"):
        by_hand(two, [TRUNK, 8], 1)
    assert len(trunks(two)) == 2


def test_what_a_killed_trunk_knew_is_learned_elsewhere(two: Served) -> None:
    linked(two)
    prompt = list(range(5, 105))
    (place,), _ = who_generated(two, lambda: ask(two, prompt))
    kill(trunks(two)[place]["pid"])
    for known in (0, 96, 96):
        assert ask(two, prompt)["usage"]["prompt_tokens_details"]["cached_tokens"] == known
