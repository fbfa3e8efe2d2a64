"""Greedy float32 output with every expert in its own Ray actor equals transformers', token for token.

The engine runs in this process and its experts in the deployed actors, so that each test chooses carrier, chunking,
cache size and load. A sequence is greedy-equal if and only if each of its tokens is transformers' most likely one after
the tokens before it, which one forward pass of transformers over the whole sequence tells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from served import Served
from served_engine import engine_over

from moe_ray.core import Request, SamplingParams
from moe_ray.engine.engine import Engine

if TYPE_CHECKING:
    from reference import Reference

NEW_TOKENS = 64
CARRIERS = ("local", "socket", "grpc", "ray")
FULL = "socket"
"""The carrier that `auto` takes meets all questions to the demo model, under stress; the others every third of them,
and less text each: what carriers make different, the random model shows at a fiftieth of the cost."""
# Small steps, small blocks, a cache that does not hold everybody: everything at once.
STRESS = {"max_num_batched_tokens": 64, "block_size": 8}


def run(
    engine: Engine,
    prompts: list[list[int]],
    neighbours: bool = False,
    stagger: int = 0,
    new_tokens: int = NEW_TOKENS,
) -> list[list[int]]:
    """Greedy outputs of all prompts in one engine; every `stagger` steps another one arrives (0: all at once)."""
    waiting = [
        Request(f"p{i}", tuple(prompt), SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    if neighbours:
        waiting += [
            Request(f"n{i}", tuple(prompt[:9]), SamplingParams(max_tokens=20 + i, temperature=1.0, seed=i))
            for i, prompt in enumerate(prompts[:4])
        ]
    outputs: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    steps = 0
    while waiting or engine.has_work:
        while waiting and (not stagger or steps % stagger == 0):
            engine.submit(waiting.pop(0))
            if stagger:
                break
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.token_ids
        engine.check_integrity()
        steps += 1
    return [outputs[f"p{i}"] for i in range(len(prompts))]


def check(
    reference: Reference, prompts: list[list[int]], outputs: list[list[int]], new_tokens: int = NEW_TOKENS
) -> None:
    """Assert that each output is transformers' greedy one."""
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == new_tokens
        assert output == reference.likeliest(prompt + output[:-1])[len(prompt) - 1 :]


@pytest.fixture(scope="module")
def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 77, 100, 128, 150, 200, 220]
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]
    return prompts + [[*prompts[-1][:n], 5, 6, 7] for n in (16, 40, 63, 64, 65, 128)]  # shared prefixes


@pytest.fixture(scope="module")
def demo_prompts(demo_model: Path) -> list[list[int]]:
    from moe_ray.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(demo_model)
    questions = json.loads((Path(__file__).parent / "questions.json").read_text())
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in questions["chat"]]
    return prompts + [tokenizer.encode(text) for text in questions["completion"]]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_random_model_alone(
    served_random: Served, carrier: str, random_prompts: list[list[int]], random_reference: Reference
) -> None:
    chosen = random_prompts[3:12:4]
    outputs = []
    for prompt in chosen:
        with engine_over(served_random, carrier) as engine:
            outputs += run(engine, [prompt])
    check(random_reference, chosen, outputs)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_random_model_under_stress(
    served_random: Served, carrier: str, random_prompts: list[list[int]], random_reference: Reference
) -> None:
    assert len(random_prompts) >= 20
    with engine_over(served_random, carrier, kv_cache_gib=0.0004, micro_batches=3, **STRESS) as engine:
        outputs = run(engine, random_prompts, neighbours=True, stagger=2)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    check(random_reference, random_prompts, outputs)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_demo_model_under_stress(
    served_demo: Served, carrier: str, demo_prompts: list[list[int]], demo_reference: Reference
) -> None:
    assert len(demo_prompts) >= 20
    full = carrier == FULL
    prompts, new_tokens = (demo_prompts, NEW_TOKENS) if full else (demo_prompts[::3], 24)
    with engine_over(served_demo, carrier, kv_cache_gib=0.07 if full else 0.015, **STRESS) as engine:
        outputs = run(engine, prompts, neighbours=True, new_tokens=new_tokens)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    check(demo_reference, prompts, outputs, new_tokens)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_demo_model_alone(
    served_demo: Served, carrier: str, demo_prompts: list[list[int]], demo_reference: Reference
) -> None:
    with engine_over(served_demo, carrier) as engine:
        outputs = run(engine, demo_prompts[:1])
    check(demo_reference, demo_prompts[:1], outputs)
