"""Ask sixteen questions at once and stream all answers: the server computes them in one continuous batch.

Run `moe-ray serve` in one terminal and `python examples/many_at_once.py` in another. Each answer's first words appear
with its own speed, then the speed of all together, which is several times that of a single one.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

TOPICS = ("the sea", "the moon", "bread", "rain", "a cat", "music", "a river", "the sun", "tea", "sleep")


async def answer(client: AsyncOpenAI, model: str, topic: str, max_tokens: int) -> int:
    """Stream one answer, print its first words and speed, return its tokens."""
    started, first, tokens, text = time.perf_counter(), 0.0, 0, ""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Write a few sentences about {topic}."}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            first = first or time.perf_counter() - started
            text += choice.delta.content or ""
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    seconds = time.perf_counter() - started
    words = " ".join(text.split()[:6])
    print(f"{topic:<8} {first:5.2f} s to the first token, {tokens / seconds:5.1f} tokens/s: {words} …", flush=True)
    return tokens


async def run(url: str, count: int, max_tokens: int) -> None:
    direct = DefaultAsyncHttpxClient(trust_env=False)  # a server of our own needs no proxy
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=direct) as client:
        model = (await client.models.list()).data[0].id
        started = time.perf_counter()
        topics = [TOPICS[i % len(TOPICS)] for i in range(count)]
        tokens = sum(await asyncio.gather(*(answer(client, model, topic, max_tokens) for topic in topics)))
        seconds = time.perf_counter() - started
    print(f"\n{count} answers, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `moe-ray serve` listens")
    parser.add_argument("-n", type=int, default=16, help="requests at once")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.url, arguments.n, arguments.max_tokens))


if __name__ == "__main__":
    main()
