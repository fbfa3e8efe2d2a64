"""The kernels as Python calls them: tensors in, tensors out, the interpreter lock released while they compute.

Weights are packed from arrays, and torch is imported where tensors are asked for: a process that only holds experts
and serves them on sockets (`host.Host`) is smaller by the 140 MB that torch takes before its first tensor.
"""

from __future__ import annotations

import ctypes
import mmap
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.native.build import KERNELS, declare, shared_library
from moe_ray.native.host import HostEntry

if TYPE_CHECKING:
    import numpy as np
    import torch

PANEL: Final = 16
"""Outputs of a linear layer that are packed side by side."""


class ModelShape(ctypes.Structure):
    """`Shape` of kernels.cpp: what all layers of a model share."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "experts", "top_k")),
        *((name, c_float) for name in ("eps", "scale")),
        ("window", c_int64),
    )


class Layer(ctypes.Structure):
    """`Layer` of kernels.cpp: where one layer's weights and cache are."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("input_norm", "qkv", "out", "post_norm", "gate", "k_cache", "v_cache")
    )


class StepInputs(ctypes.Structure):
    """`Step` of kernels.cpp: the tokens of one forward pass."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "block_size")),
        *((name, c_void_p) for name in ("positions", "slots", "sequence", "tables", "table_start", "rope")),
    )


class Expert(ctypes.Structure):
    """`Expert` of kernels.cpp: what `expert_forward` computes with."""

    _fields_ = (
        *((name, c_void_p) for name in ("pool", "w13", "w2")),
        *((name, c_int64) for name in ("hidden", "inner")),
    )


_SIGNATURES: Final = {
    "pool_new": (c_void_p, (c_int,)),
    "pool_free": (None, (c_void_p,)),
    "pack": (None, (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64)),
    "unpack_rows": (None, (c_void_p, c_int64, c_void_p, c_int64, c_void_p)),
    "linear_f32": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p)),
    "expert_ffn": (None, (*(c_void_p,) * 3, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    "layer_supported": (c_int, (c_int64, c_int64, c_int64)),
    "layer_front": (None, (c_void_p, POINTER(ModelShape), POINTER(Layer), POINTER(StepInputs), *(c_void_p,) * 5)),
    "combine": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "head": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_float, c_void_p, c_int64, c_void_p)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """bfloat16 matrices of one shape, [panels, K/2, 16, 2], as the kernels read them; several alternate by panel."""

    address: int
    n: int
    """Outputs of each matrix."""
    k: int
    """Inputs."""
    memory: mmap.mmap
    """Which the kernel may back with huge pages: a product with few rows is bound by reading it, and with small pages
    by looking their addresses up."""

    @property
    def nbytes(self) -> int:
        return len(self.memory)


class Kernels:
    """The library and the threads it computes with. One caller at a time; tensors are contiguous, on the CPU."""

    def __init__(self, cache_dir: Path, threads: int) -> None:
        """Load (on first use: build) the library. Raises `KernelsUnavailable`."""
        library = declare(shared_library(KERNELS, cache_dir), _SIGNATURES)
        self.library = library
        self._pool: int | None = library.pool_new(threads)
        self.layer_front = library.layer_front
        self.packing = Path(library._name).stem
        """Names the order of a packed matrix's bytes: the same in every process that has the same build."""

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.library.pool_free(self._pool)

    @property
    def pool(self) -> int | None:
        """The threads, as the library knows them."""
        return self._pool

    def supports_attention(self, heads: int, kv_heads: int, head_dim: int) -> bool:
        """Whether `layer_front` has a kernel for this shape."""
        return bool(self.library.layer_supported(heads, kv_heads, head_dim))

    def packed(self, n: int, k: int, count: int = 1) -> Packed:
        """Return memory for `count` matrices [n, k], k a multiple of 32, to be filled with packed ones."""
        memory = mmap.mmap(-1, 2 * -(-n // PANEL) * PANEL * k * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return Packed(ctypes.addressof(ctypes.c_char.from_buffer(memory)), n, k, memory)

    def pack(self, *weights: np.ndarray) -> Packed:
        """Return matrices [N, K] packed, K a multiple of 32; items are bfloat16, whatever numpy takes them for."""
        n, k = weights[0].shape
        packed = self.packed(n, k, len(weights))
        for index, weight in enumerate(weights):
            source = weight if weight.flags.c_contiguous else weight.copy()
            self.library.pack(source.ctypes.data, n, k, packed.address, index, len(weights))
        return packed

    def unpack_rows(self, packed: Packed, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` (int64 [T]) of a packed matrix, float32 [T, K]."""
        import torch

        out = torch.empty((rows.shape[0], packed.k))
        self.library.unpack_rows(packed.address, packed.k, rows.data_ptr(), rows.shape[0], out.data_ptr())
        return out

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return x [T, K] (bfloat16) times a packed [N, K] transposed, float32 [T, N]."""
        import torch

        out = torch.empty((x.shape[0], packed.n))
        self.library.linear_f32(
            *(self._pool, x.data_ptr(), x.shape[0], packed.address, packed.n, packed.k, out.data_ptr())
        )
        return out

    def expert_ffn(self, x: torch.Tensor, weights: torch.Tensor, w13: Packed, w2: Packed) -> torch.Tensor:
        """Return (silu(x w1^T) * (x w3^T)) w2^T * weights, bfloat16 [T, D]; w13 is `pack(w1, w3)`."""
        import torch

        out = torch.empty_like(x)
        self.library.expert_ffn(
            self._pool,
            *(x.data_ptr(), weights.data_ptr(), x.shape[0], w13.address, w2.address),
            *(x.shape[1], w13.n, out.data_ptr()),
        )
        return out

    def expert_entry(self, w13: Packed, w2: Packed) -> HostEntry:
        """What a host calls to compute as `expert_ffn` does, with these threads."""
        expert = Expert(self._pool, w13.address, w2.address, w13.k, w13.n)
        function = ctypes.cast(self.library.expert_forward, c_void_p).value
        return HostEntry(function, ctypes.addressof(expert), (expert, w13, w2, self))

    def combine(self, hidden: torch.Tensor, rows: torch.Tensor, row_of: torch.Tensor) -> None:
        """Add to hidden [T, D] float32 each token's expert rows (of bfloat16 [T * K, D]), in expert order."""
        tokens, width = hidden.shape
        self.library.combine(hidden.data_ptr(), tokens, width, row_of.shape[1], rows.data_ptr(), row_of.data_ptr())

    def head(
        self, hidden: torch.Tensor, which: torch.Tensor, norm: torch.Tensor, eps: float, packed: Packed
    ) -> torch.Tensor:
        """Return the logits float32 [S, N] of rows `which` (int64 [S]) of hidden [T, D] after the final norm."""
        import torch

        out = torch.empty((which.shape[0], packed.n))
        self.library.head(
            *(self._pool, hidden.data_ptr(), hidden.shape[1], which.data_ptr(), which.shape[0]),
            *(norm.data_ptr(), eps, packed.address, packed.n, out.data_ptr()),
        )
        return out
