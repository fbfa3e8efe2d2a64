"""The native kernels against float64, and the promise that a row's result does not depend on rows, chunks, threads."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.config import load_config
from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.engine.kv_cache import KVCache
from moe_ray.errors import ConfigError, KernelsUnavailable
from moe_ray.model import moe
from moe_ray.model.compute.base import Pass
from moe_ray.model.compute.compute import open_compute
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.trunk import NativeTrunk
from moe_ray.model.compute.resolve import NATIVE, Wanted
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import LayerWeights
from moe_ray.native import build
from moe_ray.native.build import KERNELS, shared_library
from moe_ray.native.kernels import Kernels

CACHE = load_config().cache_dir
try:
    shared_library(KERNELS, CACHE)
    WHY_NOT = ""
except KernelsUnavailable as error:
    WHY_NOT = str(error)
needs_kernels = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).bfloat16()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy()


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(CACHE, 1)


@pytest.fixture(scope="module")
def threaded() -> Kernels:
    return Kernels(CACHE, 3)


@needs_kernels
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 64), (200, 96), (1000, 512), (8, 1024)])
def test_linear(kernels: Kernels, threaded: Kernels, n: int, k: int) -> None:
    weight = random(n, k, scale=k**-0.5)
    packed = kernels.pack(bits(weight))
    assert torch.equal(kernels.unpack_rows(packed, torch.arange(n)), weight.float())
    x = random(40, k)
    exact = x.double() @ weight.double().T
    whole = kernels.linear(x, packed)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 25):
        assert torch.equal(kernels.linear(x[:rows], packed), whole[:rows]), f"{rows} rows"
    assert torch.equal(threaded.linear(x, packed), whole)


@needs_kernels
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (576, 1536)])
def test_expert(kernels: Kernels, threaded: Kernels, hidden: int, inner: int) -> None:
    w1, w3 = (random(inner, hidden, scale=hidden**-0.5, seed=i) for i in range(2))
    w2 = random(hidden, inner, scale=inner**-0.5)
    x, weights = random(30, hidden, scale=3.0), torch.rand(30)
    gate, up = x.double() @ w1.double().T, x.double() @ w3.double().T
    exact = (torch.nn.functional.silu(gate) * up) @ w2.double().T * weights[:, None]
    matrices = [bits(w) for w in (w1, w3, w2)]
    ffn = NativeFFN(*matrices, kernels)
    assert ffn.nbytes == 3 * 2 * hidden * inner
    out = ffn.forward(x, weights)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))
    one_by_one = [ffn.forward(x[i : i + 1], weights[i : i + 1]) for i in range(30)]
    assert torch.equal(torch.cat(one_by_one), out)
    assert torch.equal(NativeFFN(*matrices, threaded).forward(x, weights), out)
    assert torch.equal(ffn.forward(x[::2], weights[::2]), out[::2]), "strided rows"


@dataclass
class Weights:
    """Stands where `TrunkWeights` would, with random tensors."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def embed(self) -> torch.Tensor:
        return random(self.config.vocab_size, self.config.hidden_size).to(self.dtype)

    def layer(self, index: int) -> LayerWeights:
        c = self.config
        heads, scale = c.num_attention_heads, 2 * c.hidden_size**-0.5
        qkv = random((heads + 2 * c.num_key_value_heads) * c.head_dim, c.hidden_size, scale=scale, seed=index)
        return LayerWeights(
            input_norm=(1 + random(c.hidden_size, scale=0.1)).to(self.dtype),
            qkv=qkv.to(self.dtype),
            out=random(c.hidden_size, heads * c.head_dim, scale=(heads * c.head_dim) ** -0.5).to(self.dtype),
            post_norm=(1 + random(c.hidden_size, scale=0.1, seed=9)).to(self.dtype),
            gate=random(c.num_local_experts, c.hidden_size, scale=scale).to(self.dtype),
        )

    def norm(self) -> torch.Tensor:
        return (1 + random(self.config.hidden_size, scale=0.1, seed=5)).to(self.dtype)

    def head(self) -> torch.Tensor | None:
        if self.config.tie_word_embeddings:
            return None
        return random(self.config.vocab_size, self.config.hidden_size, scale=0.1, seed=7).to(self.dtype)


def model(heads: int, kv_heads: int, head_dim: int, **more: object) -> ModelConfig:
    raw = {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        **more,
    }
    return ModelConfig.from_dict(raw)


class Chunks:
    """Feeds sequences to a trunk in chunks, each layer's experts being simple functions of the rows."""

    def __init__(self, trunk: NativeTrunk | TorchTrunk, dtype: torch.dtype) -> None:
        self.trunk, self.block_size = trunk, 4
        self.cache = KVCache(trunk.config, 256, self.block_size, dtype, torch.device("cpu"))

    def run(self, chunks: list[tuple[int, list[int], int, int]]) -> tuple[torch.Tensor, list[moe.Routed]]:
        """One pass over chunks (number of the sequence, its tokens, start, end); logits of every position."""
        batch = Batch([], [], [], [], [0], [], [])
        for number, tokens, start, end in chunks:
            seq = Sequence(Request(str(number), (1,), SamplingParams()), tokens)
            # Blocks in no order, of no other sequence.
            seq.block_table = [(7 * b + 3) % 40 + 40 * number for b in range(-(-end // self.block_size))]
            batch.sequences.append(seq)
            batch.token_ids += tokens[start:end]
            batch.positions += range(start, end)
            batch.slot_mapping += [
                seq.block_table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)
            ]
            batch.query_start.append(len(batch.token_ids))
            batch.context_lens.append(end)
            batch.num_sampled.append(end - start)
        work: Pass = self.trunk.begin(batch, self.cache)
        routings = []
        with torch.inference_mode():
            for layer in range(self.trunk.config.num_hidden_layers):
                routed = work.route(layer)
                routings.append(routed)
                parts = (routed.rows * routed.weights[:, None]).to(routed.rows.dtype).split(routed.counts)
                work.combine(routed, torch.cat([part * (0.5 + 0.1 * e) for e, part in enumerate(parts)]))
            return work.logits(list(range(batch.num_tokens))), routings


SHAPES = [
    model(4, 4, 32),
    model(4, 2, 64, sliding_window=11),
    model(9, 3, 64, tie_word_embeddings=True),
    model(16, 4, 32, num_local_experts=17, num_experts_per_tok=3),
    model(5, 1, 128),
    model(12, 2, 96, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    model(7, 1, 32),
    model(16, 2, 32),
    model(16, 1, 256),
]


@needs_kernels
@pytest.mark.parametrize(
    "config", SHAPES, ids=lambda c: f"{c.num_attention_heads}/{c.num_key_value_heads}x{c.head_dim}"
)
def test_trunk(config: ModelConfig, kernels: Kernels, threaded: Kernels) -> None:
    weights = Weights(config, torch.bfloat16)
    one = [3 + 5 * i % 91 for i in range(70)]
    two = [1 + 7 * i % 93 for i in range(33)]
    whole = [(0, one, 0, 70), (1, two, 0, 33)]
    expected, routings = Chunks(TorchTrunk(Weights(config, torch.float32), 256), torch.float32).run(whole)  # type: ignore[arg-type]
    trunk = NativeTrunk(weights, 256, kernels)  # type: ignore[arg-type]
    got, native = Chunks(trunk, torch.bfloat16).run(whole)
    for theirs, ours in zip(routings, native, strict=True):
        assert sum(ours.counts) == 103 * config.num_experts_per_tok
        same = sum(min(a, b) for a, b in zip(theirs.counts, ours.counts, strict=True))
        assert same >= 0.97 * sum(ours.counts), "rounding may move a token near a tie, not more"
        expert_of = torch.repeat_interleave(torch.arange(len(ours.counts)), torch.tensor(ours.counts))
        assert (expert_of[ours.row_of.long()].diff(dim=-1) > 0).all(), "a token's experts ascend"
        torch.testing.assert_close(ours.weights[ours.row_of.long()].sum(-1), torch.ones(103))
    # A token that bfloat16 sends to another expert has other logits from there on: judge by the bulk.
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.median() < 0.02
    assert error.quantile(0.9) < 0.1

    # The same tokens in chunks, behind what is cached, in other company and order: the same bits.
    chunks = Chunks(trunk, torch.bfloat16)
    first, _ = chunks.run([(0, one, 0, 41)])
    mixed, _ = chunks.run([(1, two, 0, 5), (0, one, 41, 42)])
    last, _ = chunks.run([(0, one, 42, 70), (1, two, 5, 33)])
    assert torch.equal(torch.cat((first, mixed[5:], last[:28], mixed[:5], last[28:])), got)
    again, _ = Chunks(NativeTrunk(weights, 256, threaded), torch.bfloat16).run(whole)  # type: ignore[arg-type]
    assert torch.equal(again, got), "threads change nothing"


@needs_kernels
def test_the_table_of_kernels_is_that_of_the_library(kernels: Kernels) -> None:
    """What `resolve` decides by, without loading anything."""
    table = NATIVE[0]
    for head_dim in range(16, 272, 16):
        for group in range(1, 34):
            known = head_dim in table.head_dims and group in table.groups
            assert kernels.supports_attention(2 * group, 2, head_dim) == known, (head_dim, group)


def test_a_machine_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    for library in build.LIBRARIES:
        with pytest.raises(KernelsUnavailable, match="no-such-compiler"):
            shared_library(library, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.kernels is 'native': no C\+\+ compiler found"):
        open_compute(model(4, 2, 64), Wanted("bfloat16", "cpu", "native"), tmp_path)
    compute = open_compute(model(4, 2, 64), Wanted("bfloat16", "cpu"), tmp_path)
    assert compute.kernels is None
    assert (compute.backend.trunk, compute.backend.experts) == ("torch", "torch")
    assert "no C++ compiler found" in caplog.text


@needs_kernels
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelsUnavailable, match="out of luck"):
        shared_library(KERNELS, tmp_path)
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / "native"))
