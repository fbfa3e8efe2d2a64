"""A closed loop of streaming completions against any OpenAI-compatible server: so peers are measured by one client."""

from __future__ import annotations

import asyncio
import json
import math
import random
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from moe_ray.api.sse import SseReader
from moe_ray.errors import ConfigError, NotReady

if TYPE_CHECKING:
    from moe_ray.text.tokenizer import Tokenizer

Prompt = str | list[int]

LEAST_ID = 3
"""Ids below are special tokens in every Mixtral vocabulary."""
MESSAGE_CHARACTERS = 200
LONGEST_WORD = 7
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """Where completions are asked for, and what is in every request."""

    url: str
    model: str
    max_tokens: int
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Merged into each request, over what the client itself says."""
    timeout_s: float = 600.0


@dataclass(slots=True)
class Sample:
    """One request: seconds on the client's clock, taken when the bytes arrived."""

    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """Of each chunk that carries text."""
    tokens: int = 0
    prompt_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Wave:
    """What all requests of one run at one concurrency did."""

    samples: list[Sample]
    wall_s: float
    cpu_s: float
    """Of this process: the client shares the machine with what it measures."""


def connect(target_url: str, api_key: str | None, timeout_s: float, connections: int = 1) -> httpx.AsyncClient:
    """A client whose connections are as many as its requests in flight; proxies of the environment do not count."""
    return httpx.AsyncClient(
        base_url=target_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=False,
    )


async def served_model(url: str, api_key: str | None) -> str:
    """The first model that the server names. Raises `NotReady` where nothing answers, or not with a model."""
    async with connect(url, api_key, 10.0) as client:
        try:
            response = await client.get("/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotReady(f"no server answers at {url} ({error or type(error).__name__})") from None
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except httpx.HTTPStatusError:
        raise NotReady(f"{url}/v1/models answers HTTP {response.status_code}; give --model or --api-key") from None
    except (ValueError, LookupError, TypeError):
        raise NotReady(f"{url}/v1/models names no model; give --model") from None


async def run_wave(target: Target, prompts: Sequence[Prompt], concurrency: int, on_request: Callable[[], None]) -> Wave:
    """Send every prompt, `concurrency` at a time: each stream that has ended is followed by the next one."""
    waiting = iter(prompts)
    samples: list[Sample] = []
    async with connect(target.url, target.api_key, target.timeout_s, concurrency) as client:
        started, cpu = time.perf_counter(), time.process_time()

        async def worker() -> None:
            for prompt in waiting:
                samples.append(await complete(client, target, prompt))
                on_request()

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return Wave(samples, time.perf_counter() - started, time.process_time() - cpu)


async def complete(client: httpx.AsyncClient, target: Target, prompt: Prompt) -> Sample:
    """Stream one greedy completion; whatever goes wrong is in the sample's `error`."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    sample = Sample(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 200:
                sample.error = await _read_stream(response, sample, target.max_tokens)
            else:
                sample.error = f"HTTP {response.status_code}: {_message(await response.aread())}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sample.error = _cut(f"{type(error).__name__}: {error}")
    sample.ended = time.perf_counter()
    return sample


async def _read_stream(response: httpx.Response, sample: Sample, wanted: int) -> str | None:
    """Fill `sample` from the events of a stream; return what is wrong with it, or None."""
    reader, stream = SseReader(), _StreamState()
    async for piece in response.aiter_bytes():
        arrived = time.perf_counter()
        for data in reader.feed(piece):
            if data == "[DONE]":
                continue
            try:
                if error := _take_event(sample, stream, data, arrived):
                    return error
            except (ValueError, KeyError, TypeError, AttributeError):
                return _cut(f"not an event of a completion: {data}")
    if not stream.counted:  # a server without usage: it says at least whether it ran to the limit
        sample.tokens = wanted if stream.finish_reason == "length" else len(sample.arrivals)
    if sample.tokens != wanted:
        return f"{sample.tokens} of {wanted} tokens, finish_reason {stream.finish_reason!r}"
    return None if sample.arrivals else "a stream without text"


@dataclass(slots=True)
class _StreamState:
    finish_reason: str | None = None
    counted: bool = False
    """The server told its usage."""


def _take_event(sample: Sample, stream: _StreamState, data: str, arrived: float) -> str | None:
    """Account for one event; return the error that it tells of. Raises where it is no event of a completion."""
    event = json.loads(data)
    if event.get("error"):
        return _message(data.encode())
    if usage := event.get("usage"):
        sample.tokens, sample.prompt_tokens = usage["completion_tokens"], usage.get("prompt_tokens")
        stream.counted = True
    for choice in event.get("choices") or ():
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
        # Closing events are empty; but a stream whose only token is a special one has nothing else to time.
        if choice.get("text") or (stream.finish_reason and not sample.arrivals):
            sample.arrivals.append(arrived)
    return None


def id_prompts(count: int, tokens: int, vocab_size: int, seed: str) -> Iterator[list[int]]:
    """Prompts of random ids: exactly `tokens` each, and no two begin alike."""
    rng = random.Random(seed)
    for _ in range(count):
        yield [rng.randrange(LEAST_ID, vocab_size) for _ in range(tokens)]


def text_prompts(count: int, tokens: int, tokenizer: Tokenizer, seed: str) -> Iterator[str]:
    """Prompts of random words that the tokenizer (its BOS included) turns into exactly `tokens` ids.

    Raises `ConfigError` where that cannot be had.
    """
    rng = random.Random(seed)
    for _ in range(count):
        words: list[str] = []
        for _ in range(_TRIES):
            missing = tokens - len(tokenizer.encode(" ".join(words)))
            if missing == 0:
                break
            if missing < 0:
                words.pop()
                continue
            # A word of k letters is at most k + 1 tokens; which short ones are a single token, trying tells.
            longest = 2 if missing == 1 else min(LONGEST_WORD, missing - 1)
            words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, longest))))
        else:
            raise ConfigError(f"no text of exactly {tokens} tokens found for this tokenizer")
        yield " ".join(words)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


def _message(content: bytes) -> str:
    """What an error body says, in the words of OpenAI's format where it has that."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return _cut(text)


def _cut(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_CHARACTERS]
