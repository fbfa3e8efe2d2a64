"""The kernels as Python calls them: arrays or tensors in and out, the interpreter lock released while they compute.

Weights are packed from arrays, and torch is imported where tensors are asked for: a process that only holds experts
and serves them on sockets (`host.Host`) is smaller by the 140 MB that torch takes before its first tensor.
"""

from __future__ import annotations

import ctypes
import mmap
from ctypes import POINTER, c_float, c_int, c_int8, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moe_ray.native.build import KERNELS, declare, shared_library
from moe_ray.native.gating import Gating
from moe_ray.native.host import DTYPE_CODES, AdapterRun, HostEntry

if TYPE_CHECKING:
    import numpy as np
    import torch

RUN_BYTES: Final = ctypes.sizeof(AdapterRun)
INT8, INT4 = 4, 5
"""Kinds of matrix beside those of `DTYPE_CODES`; see matrix.h."""


class ModelShape(ctypes.Structure):
    """`Shape` of trunk.h: what all layers of a model share."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "experts", "top_k")),
        *((name, c_float) for name in ("eps", "scale")),
        ("window", c_int64),
        *(("residual", c_float), ("renormalise", c_int32), ("whole_qk_norm", c_int32), ("clip_qkv", c_float)),
        *((name, c_int64) for name in ("groups", "groups_chosen")),
        *(("group_best_two", c_int32), ("sigmoid", c_int32), ("routed_scale", c_float), ("latent_eps", c_float)),
        *((name, c_int64) for name in ("kv_rank", "q_rank", "nope", "value", "rope_dim")),
    )


class Layer(ctypes.Structure):
    """`Layer` of trunk.h: where one layer's weights and cache are."""

    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "qkv", "out", "gate")),
        *((name, c_void_p) for name in ("k_cache", "v_cache", "k_scales", "v_scales")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "qkv_bias", "out_bias")),
        ("float8", c_int64),
        *((name, c_void_p) for name in ("router_bias", "sinks")),
        ("full", c_int64),
        *((name, c_void_p) for name in ("correction", "q_up", "keys", "values", "q_latent_norm", "kv_latent_norm")),
    )


class StepInputs(ctypes.Structure):
    """`Step` of trunk.h: the tokens of one forward pass."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "block_size")),
        *((name, c_void_p) for name in ("positions", "slots", "sequence", "tables", "table_start", "rope", "runs")),
        ("num_runs", c_int64),
        *(("leader", c_void_p), ("shared", c_void_p)),
    )


class Expert(ctypes.Structure):
    """`Expert` of kernels.cpp: what `expert_forward` computes with."""

    _fields_ = (
        *((name, c_void_p) for name in ("pool", "w13", "w2")),
        ("dtype", c_int64),
        ("gating", c_void_p),
    )


class Header(ctypes.Structure):
    """`Header` of matrix.h: what a block of packed matrices says of itself."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "group")),
        *((name, c_int64) for name in ("n", "k", "count")),
        *((name, c_int32) for name in ("has_offsets", "has_table", "has_order")),
        ("multiplier", c_float),
        ("table", c_int8 * 16),
        ("wide_inputs", c_int32),
        ("unused", c_int8 * 188),
    )


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What the bytes of a block depend on: equal for two blocks, if one may be filled with the other's bytes."""

    kind: int
    n: int
    """Outputs of each matrix."""
    k: int
    """Inputs, a multiple of 32."""
    count: int = 1
    """Matrices that alternate by panel of 16 outputs."""
    group: int = 0
    """Inputs that share a scale: 32, 64 or 128. Floats: 0."""
    offsets: bool = False
    table: bool = False
    order: bool = False
    wide_inputs: bool = False
    """Of 8-bit codes: inputs are rounded to 16 bits, on CPUs where 8 are faster as well."""


_SIGNATURES: Final = {
    "pool_new": (c_void_p, (c_int,)),
    "pool_free": (None, (c_void_p,)),
    "block_bytes": (c_int64, (c_void_p,)),
    "table_middle": (c_int32, ()),
    "pack_floats": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "pack_codes": (None, (c_void_p, c_void_p, c_int64, *(c_void_p,) * 3, c_int64)),
    "round_codes": (None, (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32, c_int64, *(c_void_p,) * 4)),
    "unpack_rows": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "linear_f32": (None, (c_void_p, c_int32, c_void_p, c_int64, c_void_p, c_void_p)),
    "bare_loop": (c_int64, (c_void_p, c_void_p, c_int64)),
    "expert_ffn": (None, (c_void_p, c_int32, c_void_p, c_void_p, c_int64, *(c_void_p,) * 4, c_int64, c_void_p)),
    "layer_supported": (c_int, (c_int64, c_int64, c_int64)),
    "layer_front": (
        None,
        (c_void_p, c_int32, POINTER(ModelShape), POINTER(Layer), POINTER(StepInputs), *(c_void_p,) * 5),
    ),
    "combine": (None, (c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "head": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_float, *(c_void_p,) * 3, c_int64)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A block of packed matrices, as the kernels read them. Its bytes describe themselves: a copy is as good."""

    address: int
    shape: BlockShape
    memory: mmap.mmap
    """Which the kernel may back with huge pages: a product with few rows is bound by reading it, and with small pages
    by looking their addresses up."""

    @property
    def nbytes(self) -> int:
        return len(self.memory)

    @property
    def header(self) -> Header:
        """To read or, in a block that is being made, to write."""
        return Header.from_buffer(self.memory)


class Kernels:
    """The library and the threads it computes with. One caller at a time; tensors are contiguous, on the CPU."""

    def __init__(self, cache_dir: Path, threads: int, name: str) -> None:
        """Load (on first use: build) the library of one instruction set. Raises `KernelsUnavailable`."""
        library = declare(shared_library(KERNELS[name], cache_dir), _SIGNATURES)
        self.library = library
        self.name = name
        self._pool: int | None = library.pool_new(threads)
        self.layer_front = library.layer_front
        self.table_middle: int = library.table_middle()
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

    def blank(self, shape: BlockShape) -> Packed:
        """Return a block of this shape, to be packed into or filled with another's bytes."""
        header = Header(shape.kind, shape.group, shape.n, shape.k, shape.count)
        header.has_offsets, header.has_table, header.has_order = shape.offsets, shape.table, shape.order
        header.wide_inputs = shape.wide_inputs
        header.multiplier = 1.0
        memory = mmap.mmap(-1, self.library.block_bytes(ctypes.byref(header)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[: ctypes.sizeof(header)] = bytes(header)
        return Packed(ctypes.addressof(ctypes.c_char.from_buffer(memory)), shape, memory)

    def pack_floats(self, dtype: str, *weights: np.ndarray) -> Packed:
        """Return matrices [N, K] of one float dtype packed; bfloat16 items are whatever numpy takes them for."""
        n, k = weights[0].shape
        packed = self.blank(BlockShape(DTYPE_CODES[dtype], n, k, len(weights)))
        for index, weight in enumerate(weights):
            source = weight if weight.flags.c_contiguous else weight.copy()
            self.library.pack_floats(self._pool, packed.address, index, source.ctypes.data)
        return packed

    def pack_addition(self, dtype: str, *weights: np.ndarray) -> tuple[int, np.ndarray]:
        """Pack matrices [N, K] of one float dtype, K a multiple of 16, for `additions.py`: address, and what holds it.

        Unlike `Packed` it may be small: an adapter has thousands.
        """
        import numpy as np

        n, k = weights[0].shape
        header = Header(DTYPE_CODES[dtype], 0, n, k, len(weights))
        header.multiplier = 1.0
        memory = np.zeros(self.library.block_bytes(ctypes.byref(header)) + 64, dtype=np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % 64
        ctypes.memmove(address, ctypes.byref(header), ctypes.sizeof(header))
        for index, weight in enumerate(weights):
            source = np.ascontiguousarray(weight)
            self.library.pack_floats(self._pool, address, index, source.ctypes.data)
        return address, memory

    def unpack_rows(self, packed: Packed, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` (int64 [T]) of a block's first matrix, float32 [T, K]."""
        import torch

        out = torch.empty((rows.shape[0], packed.shape.k))
        self.library.unpack_rows(packed.address, rows.data_ptr(), rows.shape[0], out.data_ptr())
        return out

    def linear(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Return x [T, K] times a packed [N, K] transposed, float32 [T, N]. A block of one matrix."""
        import torch

        assert (packed.shape.count, packed.shape.k) == (1, x.shape[1])
        out = torch.empty((x.shape[0], packed.shape.n))
        self.library.linear_f32(self._pool, dtype_code(x), x.data_ptr(), x.shape[0], packed.address, out.data_ptr())
        return out

    def expert_ffn(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        w13: Packed,
        w2: Packed,
        runs: bytes = b"",
        gating: Gating | None = None,
    ) -> torch.Tensor:
        """Return (silu(x w1^T) * (x w3^T)) w2^T * weights, [T, D] as x; w13 is w1 and w3 in one block.

        `runs`: which ExpertAdapter is added for which rows, of `additions.packed_runs`. `gating`: what is computed
        instead of plain SwiGLU.
        """
        import torch

        out = torch.empty_like(x)
        self.library.expert_ffn(
            *(self._pool, dtype_code(x), x.data_ptr(), weights.data_ptr(), x.shape[0]),
            *(w13.address, w2.address, out.data_ptr(), runs or None, len(runs) // RUN_BYTES),
            None if gating is None else gating.address,
        )
        return out

    def expert_entry(self, w13: Packed, w2: Packed, dtype: str, gating: Gating | None = None) -> HostEntry:
        """What a host calls to compute as `expert_ffn` does on rows of this dtype, with these threads."""
        how = None if gating is None else gating.address
        expert = Expert(self._pool, w13.address, w2.address, DTYPE_CODES[dtype], how)
        function = ctypes.cast(self.library.expert_forward, c_void_p).value
        return HostEntry(function, ctypes.addressof(expert), (expert, w13, w2, gating, self))

    def combine(self, hidden: torch.Tensor, rows: torch.Tensor, row_of: torch.Tensor) -> None:
        """Add to hidden [T, D] float32 each token's expert rows (of [T * K, D]), in expert order."""
        tokens, width = hidden.shape
        self.library.combine(
            *(dtype_code(rows), hidden.data_ptr(), tokens, width, row_of.shape[1], rows.data_ptr(), row_of.data_ptr())
        )

    def head(
        self,
        hidden: torch.Tensor,
        which: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        packed: Packed,
        runs: bytes = b"",
    ) -> torch.Tensor:
        """Return the logits float32 [S, N] of rows `which` (int64 [S]) of hidden [T, D] after the final norm.

        `runs`: which HeadAdapter is added for which of the S rows, of `additions.packed_runs`.
        """
        import torch

        out = torch.empty((which.shape[0], packed.shape.n))
        self.library.head(
            *(self._pool, hidden.data_ptr(), hidden.shape[1], which.data_ptr(), which.shape[0]),
            *(norm.data_ptr(), eps, packed.address, out.data_ptr(), runs or None, len(runs) // RUN_BYTES),
        )
        return out


def dtype_code(tensor: torch.Tensor) -> int:
    """The kernels' number of a tensor's dtype."""
    return DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]
