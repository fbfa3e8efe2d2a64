"""Streams that ask the same prompts again and again, so that every answer can be compared with an undisturbed one."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from moe_ray.errors import NotReady


@dataclass(slots=True)
class StormAnswer:
    """One stream: which prompt, its tokens, and when they came (seconds of the client's clock)."""

    prompt: int
    started: float
    tokens: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True)
class Storm:
    """A load that runs until it is told to stop.

    Over aiohttp, not httpx as in other benches: on a machine of few cores a client that reads every token of every
    stream takes much of what it measures, and is late itself.
    """

    url: str
    model: str
    prompts: Sequence[Sequence[int]]
    output_tokens: int
    timeout_s: float = 120.0
    """Without any data."""
    answers: list[StormAnswer] = field(default_factory=list)
    ending: bool = False

    async def run(self, rounds: int | None = None) -> float:
        """One stream per prompt at a time, again and again; tokens/s. `rounds`: so often; None: until `ending`."""
        started, before = time.perf_counter(), len(self.answers)

        async def worker(index: int) -> None:
            for turn in itertools.count():
                if self.ending or turn == rounds:
                    return
                answer = await self._ask(session, index)
                self.answers.append(answer)
                if answer.error:
                    await asyncio.sleep(0.1)

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(worker(index) for index in range(len(self.prompts))))
        tokens = sum(len(answer.tokens) for answer in self.answers[before:])
        return tokens / (time.perf_counter() - started)

    async def calm(self, runs: int = 2) -> tuple[dict[int, list[str]], list[float]]:
        """Learn each prompt's undisturbed tokens; also return the tokens/s of `runs` further runs.

        Raises `NotReady` when a request fails, or its tokens differ from one run to the next.
        """
        await self.run(1)  # warms up
        self._raise_failed()
        tokens = {answer.prompt: answer.tokens for answer in self.answers}
        rates = [await self.run(2) for _ in range(runs)]
        self._raise_failed()
        if changed := changed_tokens(self.answers, tokens):
            raise NotReady(f"{changed} tokens differ between calm runs: this engine cannot be compared with itself")
        self.answers.clear()
        return tokens, rates

    def _raise_failed(self) -> None:
        if error := next((answer.error for answer in self.answers if answer.error), None):
            raise NotReady(f"a request failed before anything was disturbed: {error}")

    async def _ask(self, session: aiohttp.ClientSession, index: int) -> StormAnswer:
        answer = StormAnswer(index, time.perf_counter())
        body = {
            "model": self.model,
            "prompt": list(self.prompts[index]),
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,  # for the tokens: text can hide a changed one
            "stream": True,
        }
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return answer
                async for line in response.content:
                    if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if event.get("error"):
                        answer.error = str(event["error"])[:200]
                        return answer
                    for choice in event.get("choices", ()):
                        answer.tokens += (choice.get("logprobs") or {}).get("tokens", ())
                        answer.arrivals.append(time.perf_counter())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:200]
        if answer.error is None and len(answer.tokens) != self.output_tokens:
            answer.error = f"{len(answer.tokens)} of {self.output_tokens} tokens"
        return answer


def changed_tokens(answers: Sequence[StormAnswer], calm: dict[int, list[str]]) -> int:
    """Tokens that differ from the calm answer to the same prompt; of failed answers, those that came."""
    return sum(
        got != wanted for answer in answers for got, wanted in zip(answer.tokens, calm[answer.prompt], strict=False)
    )
