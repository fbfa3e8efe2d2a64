"""An engine with its KV cache in 8 bits: the same tokens alone, in a batch, in chunks, behind prefixes, preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BEST
from random_mixtral import save_random_mixtral

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.errors import ConfigError
from moe_ray.experts.local import local_experts
from moe_ray.llm import LLM
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.kv_bytes import kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig

HEAD_DIM, KV_HEADS, LAYERS = 32, 2, 3
NEW = 40
"""Tokens that are generated."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral that native kernels compute."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("small-mixtral"),
        seed=1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=512,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )


def engine_of(directory: Path, dtype: str = "bfloat16", kernels: str = "auto", **engine: Any) -> Engine:
    config = load_config(
        {
            "model": {"dtype": dtype, "device": "cpu", "kernels": kernels},
            "engine": {"kv_cache_gib": 0.01, "kv_cache_dtype": "int8", "micro_batches": 1, **engine},
        }
    )
    checkpoint = Checkpoint.open(directory)
    return build_engine(config, checkpoint, lambda compute: local_experts(checkpoint, compute))


of_int8 = engine_of


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy outputs of prompts that come together."""
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.submit(Request(f"p{i}", tuple(prompt), SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)))
        outputs[f"p{i}"] = []
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.token_ids
        engine.check_integrity()
    return list(outputs.values())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (1, 3, 16, 33, 100, 150)]
    return [*made, [*made[-1][:64], 5, 6], [*made[-1][:65], 7]]  # shared prefixes


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
@pytest.mark.parametrize("held", ["int8", "fp8"])
def test_the_same_tokens_however_they_are_computed(small_model: Path, held: str) -> None:
    def engine_of(directory: Path, **engine: Any) -> Engine:
        return of_int8(directory, kv_cache_dtype=held, **engine)

    alone = [run(engine_of(small_model), [prompt])[0] for prompt in prompts()]
    assert len(set(map(tuple, alone))) == len(alone)
    together = engine_of(small_model)
    assert run(together, prompts()) == alone
    assert run(together, prompts()) == alone
    assert together.stats().prefix_hit_tokens > 200
    chunked = engine_of(small_model, max_num_batched_tokens=24, block_size=8, max_num_seqs=3)
    assert run(chunked, prompts()) == alone
    crowded = engine_of(small_model, kv_cache_gib=0.00009, block_size=4, max_num_batched_tokens=64)
    assert run(crowded, prompts()) == alone
    assert crowded.stats().preemptions > 0
    parts = engine_of(small_model, micro_batches=3)
    assert run(parts, prompts()) == alone


def test_torch_keeps_int8_as_well(small_model: Path) -> None:
    """On a CPU without kernels, and on a card: tokens are the same until rounding decides between two."""
    ours, torchs = engine_of(small_model, "float32"), engine_of(small_model, "float32", "torch", block_size=8)
    expected = run(ours, prompts())
    for got in (run(torchs, prompts()), run(torchs, prompts())):
        alike = sum(a == b for one, other in zip(expected, got, strict=True) for a, b in zip(one, other, strict=True))
        assert alike > 0.5 * NEW * len(expected)
    assert torchs.stats().prefix_hit_tokens > 200


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_memory_holds_more_tokens(small_model: Path, dtype: str) -> None:
    model = ModelConfig.load(small_model)
    width = {"bfloat16": 2, "float32": 4}[dtype] * HEAD_DIM
    assert kv_bytes_per_token(model, dtype) == 2 * LAYERS * KV_HEADS * width
    assert kv_bytes_per_token(model, "int8") == 2 * LAYERS * KV_HEADS * (HEAD_DIM + 4)
    assert kv_bytes_per_token(model, "fp8") == 2 * LAYERS * KV_HEADS * HEAD_DIM
    gib = 0.001
    engines = [engine_of(small_model, dtype, kv_cache_gib=gib, kv_cache_dtype=held) for held in ("auto", "int8")]
    floats, codes = (engine.stats().kv_blocks_total * 16 for engine in engines)
    assert codes / floats == pytest.approx(width / (HEAD_DIM + 4), rel=0.02)
    for engine in engines:
        assert 0.97 * gib * 2**30 < engine.kv_cache_bytes <= gib * 2**30 + 2**10, "and one spare slot"


def test_another_dtype_is_refused_by_key(small_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype.*'auto', 'int8' or 'fp8'"):
        LLM(small_model, kv_cache_dtype="fp8_e5m2")
    config = load_config({"engine": {"kv_cache_dtype": "fp8_e4m3"}})  # as vLLM spells it
    assert config.engine.kv_cache_dtype == "fp8"
