"""Logits of positions far into a context, beside those of transformers: by rotary embedding, with sliding windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from backends import BEST, native
from random_mixtral import save_random_mixtral
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from moe_ray.config import load_config
from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.engine.kv_cache import KVCache
from moe_ray.errors import CheckpointError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.layers import rope_table
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk import Trunk, interleave
from moe_ray.native.kernels import Kernels

SHAPE: Final = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,  # all: rounding sends no token elsewhere
    "max_position_embeddings": 32768,
    "initializer_range": 0.2,
}
YARN: Final = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "yarn": YARN,
    "yarn with an attention_factor": {**YARN, "attention_factor": 0.8},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn with betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, not truncated": {**YARN, "truncate": False},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3},
}
STEP: Final = 2048
"""Tokens that transformers computes at a time: its masks have a number for each of them and each position."""


def their_logits(directory: Path, tokens: list[int], wanted: list[int]) -> torch.Tensor:
    """Logits [len(wanted), V] by transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for start in range(0, len(tokens), STEP):
            part = torch.tensor([tokens[start : start + STEP]])
            logits = model(part, past_key_values=cache, use_cache=True).logits[0]
            found += [logits[i - start] for i in wanted if start <= i < start + STEP]
    return torch.stack(found)


def our_logits(directory: Path, backend: Backend, tokens: list[int], wanted: list[int], step: int) -> torch.Tensor:
    """The same by a trunk that computes `step` tokens at a time, over blocks in no order."""
    checkpoint, size = Checkpoint.open(directory), 16
    kernels = Kernels(load_config().cache_dir, 2, backend.kernels) if backend.native else None
    compute = Compute(backend, kernels, 2)
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, len(tokens))
    blocks = -(-len(tokens) // size)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
    cache = KVCache(trunk.config, blocks, size, trunk.dtype, trunk.device)
    sequence, found = Sequence(Request("r", tuple(tokens), SamplingParams()), tokens, block_table=table), []
    for start in range(0, len(tokens), step):
        end = min(start + step, len(tokens))
        positions = list(range(start, end))
        slots = [table[p // size] * size + p % size for p in positions]
        batch = Batch([sequence], tokens[start:end], positions, slots, [0, end - start], [end], [end - start])
        with torch.inference_mode():
            logits = interleave([trunk.forward(batch, cache)])[0]
        found += [logits[i - start] for i in wanted if start <= i < end]
    return torch.stack(found)


def compare(directory: Path, length: int, backends: list[Backend], **more: Any) -> None:
    save_random_mixtral(directory, seed=5, **{**SHAPE, **more})
    tokens = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ends = [4 << 10, 16 << 10, 32 << 10] if length > STEP else [700, length]
    wanted = [end - back for end in ends if end <= length for back in (30, 2, 1)]
    theirs = their_logits(directory, tokens, wanted)
    assert len({tuple(row.round(decimals=3).tolist()) for row in theirs}) == len(wanted)
    for backend in backends:
        ours = our_logits(directory, backend, tokens, wanted, 509)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


BACKENDS: Final = [Backend("float32"), *([native("float32", BEST)] if BEST else [])]


@pytest.mark.parametrize("more", [{"sliding_window": 300}, {"rope_parameters": {**YARN, "factor": 2.0}}], ids=str)
def test_some_way_into_a_context(more: dict[str, Any], tmp_path: Path) -> None:
    compare(tmp_path, 1200, BACKENDS, num_hidden_layers=1, **more)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rotations_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """Of positions up to 32,767, where float32 has few bits left for an angle's fraction."""
    theirs = MixtralConfig(**{**SHAPE, "rope_parameters": rope})
    positions = torch.tensor([[0, 1, 4095, 16383, 16384, 16385, 32767]])
    cos, sin = MixtralRotaryEmbedding(theirs)(torch.zeros(1, 7, 64), positions)
    ours = rope_table(ModelConfig.from_dict(theirs.to_dict()), 32768, torch.float32, torch.device("cpu"))[positions[0]]
    assert torch.equal(ours, torch.stack((cos[0], sin[0]), dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "linear", "yarn with mscale"])
def test_far_into_a_context(name: str, tmp_path: Path) -> None:
    """The native kernels at 4,096, 16,384 and 32,768 positions."""
    compare(tmp_path, 32768, BACKENDS[-1:], num_hidden_layers=1, rope_parameters=ROPES[name])


@pytest.mark.slow
def test_a_sliding_window_far_into_a_context(tmp_path: Path) -> None:
    compare(tmp_path, 16384, BACKENDS[-1:], num_hidden_layers=1, rope_parameters=ROPES["default"], sliding_window=4096)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_what_depends_on_a_sequences_length_is_refused(kind: str, tmp_path: Path) -> None:
    more = {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096, **more}
    save_random_mixtral(tmp_path, seed=5, **{**SHAPE, "rope_parameters": rope})
    with pytest.raises(CheckpointError, match=f"rope_type '{kind}' is not supported"):
        Checkpoint.open(tmp_path)
