"""Heat some experts with prompts about code, and watch the autoscaler give them replicas and take them away again.

Run `moe-ray serve` so that it may scale, for instance on a small machine, where eight experts share few cores and each
is busy for a small share of its time only:

    MOE_RAY_EXPERTS__AUTOSCALE='{"enabled": true, "target_busy": 0.06, "max_total_replicas": 12, "down_after_s": 15}' \\
    MOE_RAY_EXPERTS__MAX_REPLICAS=3 moe-ray serve

and `python examples/hot_experts.py` in another terminal. Every other second it prints the speed of the streams, the
share of its time that the busiest replica computes, and each expert's rows/s with its replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

QUESTIONS = (
    "Write a Python function that reverses a linked list.",
    "Write a SQL query that finds the ten best customers.",
    "Write a Java class for a bank account with tests.",
    "Write a bash script that renames all files to lower case.",
)
EVERY_S = 2.0


@dataclass
class Load:
    """Streams that ask about code for as long as they are wanted, and the tokens that came."""

    client: AsyncOpenAI
    model: str
    tokens: int = 0
    failed: int = 0
    streams: list[asyncio.Task[None]] = field(default_factory=list)

    async def stream(self, number: int) -> None:
        for turn in range(10_000):
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            try:
                answer = await self.client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": question}], max_tokens=128, stream=True
                )
                async for chunk in answer:
                    self.tokens += bool(chunk.choices and chunk.choices[0].delta.content)
            except OpenAIError as error:
                self.failed += 1
                print(f"a request failed: {error}", flush=True)

    def want(self, count: int) -> None:
        """Run so many streams."""
        while len(self.streams) > count:
            self.streams.pop().cancel()
        self.streams += [asyncio.create_task(self.stream(i)) for i in range(len(self.streams), count)]


def line(experts: list[dict[str, Any]]) -> str:
    """Each expert's rows/s, and a mark per replica."""
    return "  ".join(f"{e['expert']}:{e['rows_per_s']:4.0f} {'▮' * len(e['replicas']):<3}" for e in experts)


async def run(url: str, streams: int, calm_s: float, hot_s: float, cool_s: float) -> None:
    direct = DefaultAsyncHttpxClient(trust_env=False)  # a server of our own needs no proxy
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=direct) as client,
        httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as http,
    ):
        load = Load(client, (await client.models.list()).data[0].id)
        started, most = time.perf_counter(), 0
        for name, seconds, count in (("calm", calm_s, 1), ("hot", hot_s, streams), ("cool", cool_s, 0)):
            load.want(count)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                since, before = time.perf_counter(), load.tokens
                await asyncio.sleep(EVERY_S)
                rate = (load.tokens - before) / (time.perf_counter() - since)
                experts = (await http.get("/experts")).json()["experts"]
                replicas = [replica for expert in experts for replica in expert["replicas"]]
                busiest = max((replica["busy"] for replica in replicas), default=0.0)
                most = max(most, len(replicas))
                at = time.perf_counter() - started
                print(f"{at:4.0f} s {name:<4} {rate:5.0f} tok/s  busiest {busiest:4.0%}  {line(experts)}", flush=True)
        load.want(0)
        print(f"\n{load.tokens} tokens, {load.failed} failed requests, {most} replicas at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `moe-ray serve` listens")
    parser.add_argument("-n", type=int, default=8, help="streams while it is hot")
    parser.add_argument("--calm", type=float, default=14.0, help="seconds with one stream at first")
    parser.add_argument("--hot", type=float, default=60.0, help="seconds with all streams")
    parser.add_argument("--cool", type=float, default=60.0, help="seconds without any at last")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.url, arguments.n, arguments.calm, arguments.hot, arguments.cool))


if __name__ == "__main__":
    main()
