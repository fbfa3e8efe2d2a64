"""Stream one chat answer from a running server, with OpenAI's own client.

Run `moe-ray serve` in one terminal and `python examples/chat_stream.py` in another. The answer appears word by word,
then one line with the token counts.
"""

from __future__ import annotations

import argparse

from openai import DefaultHttpxClient, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `moe-ray serve` listens")
    arguments = parser.parse_args()

    direct = DefaultHttpxClient(trust_env=False)  # a server of our own needs no proxy
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none", http_client=direct)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": arguments.question}],
        temperature=0,
        max_tokens=256,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n\n{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} tokens out")


if __name__ == "__main__":
    main()
