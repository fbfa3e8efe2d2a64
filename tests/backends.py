"""Every backend that computes here, for the tests that hold for all of them; random weights in the form each wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from platform import machine

import pytest
import torch

from moe_ray.config import load_config
from moe_ray.errors import KernelsUnavailable
from moe_ray.model.compute.base import FFN, TrunkCompute
from moe_ray.model.compute.compute import Compute, triton_here
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.held_form import form_of, hold
from moe_ray.model.compute.native.trunk import NativeTrunk
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.families import TrunkRole
from moe_ray.model.matrix import FloatMatrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import VECTORS, LayerWeights
from moe_ray.model.weights import weights_of_trunk
from moe_ray.native.build import KERNELS, cpu_flags, kernels_here
from moe_ray.native.kernels import Kernels

BEST = kernels_here()
"""The native kernels of this machine."""
HERE = [name for name, row in KERNELS.items() if machine() in row.architectures and row.needs <= cpu_flags()]
"""All native kernels that it can run."""


def native(dtype: str, kernels: str | None) -> Backend:
    return Backend(dtype, "cpu", "native", "native", kernels or "avx2")


BACKENDS = {
    "native bfloat16": native("bfloat16", BEST),
    "native float32": native("float32", BEST),
    "native float16": native("float16", BEST),
    **{f"{name} bfloat16": native("bfloat16", name) for name in HERE if name != BEST},
    **{f"{name} float32": native("float32", name) for name in HERE[-1:] if name != BEST},
    "torch float32": Backend("float32"),
    "torch bfloat16": Backend("bfloat16"),
    "torch float16": Backend("float16"),
}


EXPERTS_BY_TRITON = {
    f"triton {dtype}": Backend(dtype, experts="triton") for dtype in ("float32", "bfloat16", "float16")
}
"""In Triton's interpreter, which is slow: for fewer tests than the others."""
TRUNKS_BY_TRITON = {"triton trunk float32": Backend("float32", trunk="triton")}
"""The same."""


@cache
def open_backend(name: str, threads: int = 1) -> Compute:
    """The backend of this name; skips the test where this machine cannot run it."""
    by_triton = EXPERTS_BY_TRITON | TRUNKS_BY_TRITON
    if name in by_triton and triton_here() != "interprets":
        pytest.skip("Triton is not installed, or compiles for a card")
    backend = (BACKENDS | by_triton)[name]
    try:
        kernels = Kernels(load_config().cache_dir, threads, backend.kernels) if backend.native else None
        return Compute(backend, kernels, threads)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normally distributed values that every dtype here holds exactly but float16 (which has too few exponents)."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).bfloat16()


def ffn_of(compute: Compute, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, quantize: str | None = None) -> FFN:
    """An expert of bfloat16 matrices, as the backend of `compute` holds it."""
    if compute.kernels is None:
        return TorchFFN(*(each.to(compute.torch_dtype) for each in (w1, w3, w2)), "silu")
    gate, up, down = map(FloatMatrix, (w1, w3, w2))
    w13 = hold(compute.kernels, form_of([gate, up], compute.dtype, quantize), [gate], [up])
    held = hold(compute.kernels, form_of([down], compute.dtype, quantize), [down])
    return NativeFFN(w13, held, compute.kernels, compute.dtype)


def trunk_of(compute: Compute, config: ModelConfig, max_model_len: int, quantize: str | None = None) -> TrunkCompute:
    """A trunk of random weights, the same for every backend but for rounding."""
    weights = RandomWeights(config, compute.torch_dtype)
    if compute.kernels is None:
        return TorchTrunk(weights, max_model_len)  # type: ignore[arg-type]
    return NativeTrunk(weights, max_model_len, compute.kernels, compute.dtype, quantize)  # type: ignore[arg-type]


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
        q, kv = heads * c.head_dim, c.num_key_value_heads * c.head_dim
        qkv = [random(n, c.hidden_size, scale=scale, seed=index + i) for i, n in enumerate((q, kv, kv))]
        out = random(c.hidden_size, q, scale=q**-0.5)
        return LayerWeights(
            input_norm=(1 + random(c.hidden_size, scale=0.1)).to(self.dtype),
            qkv=[FloatMatrix(each.to(self.dtype)) for each in qkv],
            out=FloatMatrix(out.to(self.dtype)),
            post_norm=(1 + random(c.hidden_size, scale=0.1, seed=9)).to(self.dtype),
            gate=random(c.num_local_experts, c.hidden_size, scale=scale).to(self.dtype),
            vectors={
                weight.role: random(*weight.shape, seed=index + 20).to(self.dtype)
                for weight in weights_of_trunk(c)
                if weight.layer == index and weight.role in VECTORS
            },
        )

    def norm(self) -> torch.Tensor:
        return (1 + random(self.config.hidden_size, scale=0.1, seed=5)).to(self.dtype)

    def optional(self, role: TrunkRole) -> None:
        return

    def head(self) -> FloatMatrix | None:
        if self.config.tie_word_embeddings:
            return None
        return FloatMatrix(random(self.config.vocab_size, self.config.hidden_size, scale=0.1, seed=7).to(self.dtype))

    def tensor(self, *rows: FloatMatrix) -> torch.Tensor:
        return torch.cat([matrix.tensor for matrix in rows])
