"""Ask a running server the same questions with each of its models: the base, and the adapters beside it.

Run `moe-ray serve --adapter python=python-adapter` in one terminal and `python examples/finetune/ask.py` in another.
Each question appears with one answer a model. Without questions of your own, held-out ones of the training are asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="*", help="what to ask; default: of --held-out")
    parser.add_argument(
        "--held-out", type=Path, default=Path("python-adapter/held_out.jsonl"), help="as train.py saves"
    )
    parser.add_argument("-n", type=int, default=3, help="questions taken of --held-out (3)")
    parser.add_argument("--max-tokens", type=int, default=60, help="of an answer (60)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `moe-ray serve` listens")
    arguments = parser.parse_args()

    questions = dict.fromkeys(arguments.question, "")
    if not questions:
        try:
            lines = arguments.held_out.read_text(encoding="utf-8").splitlines()[: arguments.n]
        except OSError as error:
            sys.exit(f"--held-out {arguments.held_out}: {error.strerror}; give questions, or run train.py first")
        questions = {row["question"]: row["answer"] for row in map(json.loads, lines)}

    direct = DefaultHttpxClient(trust_env=False)  # a server of our own needs no proxy
    client = OpenAI(base_url=f"{arguments.url}/v1", api_key="none", http_client=direct)
    models = [model.id for model in client.models.list().data]
    for question, written in questions.items():
        print(f"{question}{f'  [{written}]' if written else ''}")
        for model in models:
            response = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=arguments.max_tokens,
            )
            print(f"  {model}: {' '.join((response.choices[0].message.content or '').split())}")
        print()


if __name__ == "__main__":
    main()
