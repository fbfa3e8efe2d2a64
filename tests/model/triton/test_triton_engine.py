"""A whole engine with its trunk by Triton, in the interpreter: transformers' tokens, however they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_mixtral import save_random_mixtral
from reference import Reference
from stepping import events_of

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.experts.client.dispatcher import ExpertDispatcher
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.triton.launch import INTERPRETED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETED, reason="a card is here")]

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that greedy decoding does not repeat itself
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = [[5, 7, 11], [(3 + 5 * i) % 90 + 3 for i in range(30)], [(1 + 7 * i) % 90 + 3 for i in range(13)]]
NEW = 6


def engine_of(directory: Path, **engine: Any) -> Engine:
    """A trunk by Triton, over experts by torch."""
    config = load_config(
        {
            "model": {"dtype": "float32", "device": "cpu", "kernels": "triton"},
            "engine": {"kv_cache_tokens": 512, "block_size": 4, "micro_batches": 1, **engine},
        }
    )
    checkpoint = Checkpoint.open(directory)

    def experts(compute: Compute) -> ExpertDispatcher:
        assert compute.backend.trunk == "triton"
        return local_experts(checkpoint, replace(compute, backend=replace(compute.backend, experts="torch")))

    return build_engine(config, checkpoint, experts)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers to prompts that come together."""
    sampling = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    requests = [Request(f"p{i}", tuple(prompt), sampling) for i, prompt in enumerate(prompts)]
    events = events_of(engine, requests)
    return [[token for event in events[request.request_id] for token in event.token_ids] for request in requests]


@pytest.mark.parametrize(("window", "seed"), [(None, 3), (9, 5)], ids=["full", "window"])
def test_tokens_are_those_of_transformers(window: int | None, seed: int, tmp_path: Path) -> None:
    directory = save_random_mixtral(tmp_path / "model", seed=seed, sliding_window=window, **SHAPE)
    reference = Reference(directory)
    wanted = [reference.greedy(prompt, NEW) for prompt in PROMPTS]
    assert all(len(answer) == NEW for answer in wanted), "no answer ends early, so `ignore_eos` changes none"
    engine = engine_of(directory, max_num_batched_tokens=16)
    assert answers(engine, PROMPTS) == wanted, "in one batch, long prompts in chunks"
    assert answers(engine, PROMPTS[1:2]) == wanted[1:2], "alone, behind what is cached of its prompt"
    assert engine.stats().prefix_hit_tokens > 0
    assert answers(engine_of(directory, enable_prefix_caching=False), PROMPTS[:1]) == wanted[:1], "alone"


def test_an_int8_cache_gives_the_same_tokens_alone_and_in_a_batch(tmp_path: Path) -> None:
    directory = save_random_mixtral(tmp_path / "model", seed=4, **SHAPE)
    together = answers(engine_of(directory, kv_cache_dtype="int8", max_num_batched_tokens=16), PROMPTS)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answers(engine_of(directory, kv_cache_dtype="int8"), [prompt]) == [answer]
