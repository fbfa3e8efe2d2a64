"""Every backend that computes here, for the tests that hold for all of them; random weights in the form each wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from moe_ray.config import load_config
from moe_ray.errors import KernelsUnavailable
from moe_ray.model.compute.base import FFN, TrunkCompute
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.trunk import NativeTrunk
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import LayerWeights
from moe_ray.native.kernels import Kernels

BACKENDS = {
    "native bfloat16": Backend("bfloat16", "cpu", "native", "native"),
    "torch float32": Backend("float32"),
    "torch bfloat16": Backend("bfloat16"),
    "torch float16": Backend("float16"),
}


@cache
def open_backend(name: str, threads: int = 1) -> Compute:
    """The backend of this name; skips the test where this machine cannot run it."""
    backend = BACKENDS[name]
    try:
        return Compute(backend, Kernels(load_config().cache_dir, threads) if backend.native else None, threads)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normally distributed values that every dtype here holds exactly but float16 (which has too few exponents)."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).bfloat16()


def ffn_of(compute: Compute, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> FFN:
    """An expert of bfloat16 matrices, as the backend of `compute` holds it."""
    if compute.kernels is None:
        return TorchFFN(*(each.to(compute.torch_dtype) for each in (w1, w3, w2)), "silu")
    return NativeFFN(*(each.view(torch.int16).numpy() for each in (w1, w3, w2)), compute.kernels)


def trunk_of(compute: Compute, config: ModelConfig, max_model_len: int) -> TrunkCompute:
    """A trunk of random weights, the same for every backend but for rounding."""
    weights = RandomWeights(config, compute.torch_dtype)
    if compute.kernels is None:
        return TorchTrunk(weights, max_model_len)  # type: ignore[arg-type]
    return NativeTrunk(weights, max_model_len, compute.kernels)  # type: ignore[arg-type]


@dataclass
class RandomWeights:
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
