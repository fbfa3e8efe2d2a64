"""Generate in this process, without a server and without Ray: a batch of prompts, then one chat.

Run `python examples/offline.py`. The model loads in a few seconds (the demo model is built on first use); then three
completions appear, and one answer.
"""

from __future__ import annotations

import argparse

from moe_ray import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a directory, a Hugging Face repo id, or `demo`")
    arguments = parser.parse_args()

    llm = LLM(arguments.model)
    sampling = SamplingParams(max_tokens=24, temperature=0)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, sampling), strict=True):
        print(f"{prompt!r} → {output.text!r} ({len(output.token_ids)} tokens, {output.finish_reason})")

    question = "What is the capital of Italy?"
    answer = llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=64, temperature=0.2, seed=1))
    print(f"\n{question}\n{answer.text}")


if __name__ == "__main__":
    main()
