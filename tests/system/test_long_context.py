"""32,768 tokens end to end: the same tokens however a prompt is computed; memory grows by the KV cache alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_mixtral import save_random_mixtral

from moe_ray import LLM, SamplingParams

pytestmark = pytest.mark.slow

LONGEST = 32768
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "num_local_experts": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
}
TOKEN_BYTES = 2 * 32 * 2  # K and V of bfloat16
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def opened(directory: Path, demo_model: Path, chunk: int, **model: Any) -> LLM:
    save_random_mixtral(directory, seed=11, like=demo_model, **{**SHAPE, **model})
    engine = {"max_num_batched_tokens": chunk, "max_num_seqs": 4, "kv_cache_tokens": 2 * LONGEST}
    return LLM(directory, dtype="bfloat16", max_model_len=LONGEST, engine=engine)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("window", [None, 4096])
def test_a_prompt_of_32k_tokens(window: int | None, tmp_path: Path, demo_model: Path) -> None:
    """In chunks of 512 and of 64 tokens, and behind what the prefix cache holds of it."""
    prompt = tokens(LONGEST - 20, 1)
    wide = opened(tmp_path / "wide", demo_model, 512, sliding_window=window)
    first = wide.generate([prompt], GREEDY)[0]
    again = wide.generate([prompt], GREEDY)[0]
    assert len(first.token_ids) == 16
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, (LONGEST - 21) // 16 * 16)
    narrow = opened(tmp_path / "narrow", demo_model, 64, sliding_window=window).generate([prompt], GREEDY)[0]
    assert first.token_ids == again.token_ids == narrow.token_ids


def test_memory_grows_by_the_kv_cache_alone(tmp_path: Path, demo_model: Path) -> None:
    llm = opened(tmp_path, demo_model, 512)
    llm.generate([tokens(8192, 2)], GREEDY)
    before = resident_bytes()
    llm.generate([tokens(LONGEST - 20, 3)], GREEDY)
    grown = resident_bytes() - before
    assert grown < (LONGEST + 1024) * TOKEN_BYTES + (24 << 20), f"{grown / 2**20:.0f} MiB"
