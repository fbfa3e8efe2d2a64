"""What adapters add to a trunk of native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model.lora.parts import LayerPart, LowRank, MatrixPart
from moe_ray.model.lora.step import StepAdapters, TokenRun
from moe_ray.model.matrix import FloatMatrix, tensor_of
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.additions import AdditionPacker, BlockPart, HeadAdapter, LayerAdapter, packed_runs
from moe_ray.native.host import AdapterRun
from moe_ray.native.kernels import Kernels, Packed

if TYPE_CHECKING:
    from moe_ray.model.lora.adapter_file import Adapter

_RANKS = 16


class TrunkAdapter:
    """One adapter, packed."""

    def __init__(self, adapter: Adapter, config: ModelConfig, kernels: Kernels, dtype: str) -> None:
        """Read what it adds to the trunk. Raises `AdapterError`."""
        part = adapter.trunk_part()
        self.expert_layers = frozenset(filter(adapter.touches_experts, range(config.num_hidden_layers)))
        self._packer = AdditionPacker(kernels, dtype)
        self._config = config
        self.layers = (LayerAdapter * len(part.layers))(*map(self._layer, part.layers))
        """By layer, one behind the other."""
        self.shared = [each.shared for each in part.layers]
        """What is added to each layer's shared expert."""
        self.shares = [None if each.share is None else _Share(each.share, kernels, dtype) for each in part.layers]
        self.embed = None if part.embed is None else _Embedding(part.embed, kernels)
        head = part.head or MatrixPart()
        addition = self._packer.pack([BlockPart(head.low_rank, config.vocab_size)])
        self.head_addition = None if head.low_rank is None else HeadAdapter(addition)
        self.head: Packed | None = None
        """In the model's stead."""
        if head.whole is not None:
            self.head = kernels.pack_floats(dtype, FloatMatrix(_tensor(head.whole).to(_dtype(dtype))).values())
        self.nbytes = self._packer.nbytes + (0 if self.head is None else self.head.nbytes)
        self.nbytes += 0 if self.embed is None else self.embed.nbytes
        self.nbytes += sum(share.nbytes for share in self.shares if share is not None)

    def _layer(self, part: LayerPart) -> LayerAdapter:
        c = self._config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        pack = self._packer.pack
        return LayerAdapter(
            pack([BlockPart(part.q, q), BlockPart(part.k, kv), BlockPart(part.v, kv)]),
            pack([BlockPart(part.out, c.hidden_size)]),
            pack([BlockPart(part.router, c.num_local_experts)]),
        )


class _Embedding:
    """What becomes of the tokens' embeddings."""

    def __init__(self, part: MatrixPart, kernels: Kernels) -> None:
        self._kernels = kernels
        self._whole = None if part.whole is None else _tensor(part.whole)  # [V, D]
        self._rows: torch.Tensor | None = None  # [V, rank]
        self._b: Packed | None = None  # [D, rank], of float32: sums run in one fixed order
        if part.low_rank is not None:
            rows, b = _padded(part.low_rank)
            self._rows, self._b = _tensor(rows), kernels.pack_floats("float32", b)
        self.nbytes = sum(each.nbytes for each in (self._whole, self._rows, self._b) if each is not None)

    def apply(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """Change the model's embeddings float32 [T, D] of tokens `ids` [T]."""
        if self._whole is not None:
            hidden.copy_(F.embedding(ids, self._whole))
        if self._rows is not None and self._b is not None:
            hidden += self._kernels.linear(F.embedding(ids, self._rows), self._b)


class _Share:
    """What is added to the products that say how much of a shared expert counts."""

    def __init__(self, part: LowRank, kernels: Kernels, dtype: str) -> None:
        a, b = _padded(part)
        self._kernels = kernels
        self._a = kernels.pack_floats(dtype, FloatMatrix(_tensor(a.T.copy()).to(_dtype(dtype))).values())  # [rank, D]
        self._b = kernels.pack_floats("float32", b)  # [1, rank]
        self.nbytes = self._a.nbytes + self._b.nbytes

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 [T, 1] for rows [T, D]."""
        return self._kernels.linear(self._kernels.linear(rows, self._a), self._b)


class NativeStepAdapters(StepAdapters[TrunkAdapter]):
    """The adapters of one batch, as the kernels take them."""

    def __init__(self, batch: Batch, held: Mapping[int, TrunkAdapter]) -> None:
        super().__init__(batch, held)
        self.layer_runs = (AdapterRun * len(self.runs))()
        """Of the layer that `at_layer` was called for last."""
        for layer_run, run in zip(self.layer_runs, self.runs, strict=True):
            layer_run.id, layer_run.count = run.adapter_id, run.end - run.start
        self._starts = [None if run.held is None else ctypes.addressof(run.held.layers) for run in self.runs]

    def at_layer(self, layer: int) -> None:
        """Let `layer_runs` be those of a layer."""
        size = ctypes.sizeof(LayerAdapter)
        for index, start in enumerate(self._starts):
            if start is not None:
                self.layer_runs[index].adapter = start + layer * size

    def embed(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """Change the embeddings [T, D] of the tokens [T] whose adapters say so."""
        for run in self.runs:
            if run.held is not None and run.held.embed is not None:
                run.held.embed.apply(ids[run.start : run.end], hidden[run.start : run.end])

    def add_share(self, layer: int, rows: torch.Tensor, share: torch.Tensor) -> None:
        """Add to the products [T, 1] of rows [T, D] with a layer's `shared_share`."""
        for run in self.runs:
            if run.held is not None and (added := run.held.shares[layer]) is not None:
                share[run.start : run.end] += added.of(rows[run.start : run.end])

    def heads(self, rows: Sequence[int], head: Packed) -> list[tuple[int, Packed, bytes]]:
        """How the logits of these flat positions, ascending, are computed: (how many, matrix, additions) in order."""
        ends = [run.end for run in self.runs]
        counts = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends)).tolist()
        picked = [(run, count) for run, count in zip(self.runs, counts, strict=True) if count]
        computed = []
        for matrix, some in groupby(picked, key=lambda each: _head_of(each[0], head)):
            runs = list(some)
            addresses = [_addition_of(run) for run, _ in runs]
            additions = b""
            if any(addresses):
                additions = packed_runs(
                    [(run.adapter_id, address, count) for (run, count), address in zip(runs, addresses, strict=True)]
                )
            computed.append((sum(count for _, count in runs), matrix, additions))
        return computed


def _head_of(run: TokenRun[TrunkAdapter], head: Packed) -> Packed:
    return head if run.held is None or run.held.head is None else run.held.head


def _addition_of(run: TokenRun[TrunkAdapter]) -> int | None:
    if run.held is None or run.held.head_addition is None:
        return None
    return ctypes.addressof(run.held.head_addition)


def _padded(low_rank: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """Of an embedding: rows [V, rank] and scaled b [D, rank] in float32, rank a multiple of 16."""
    a, b = low_rank.a.astype(np.float32), low_rank.b.astype(np.float32) * np.float32(low_rank.scale)
    more = -len(a) % _RANKS
    return np.ascontiguousarray(np.pad(a, ((0, more), (0, 0))).T), np.pad(b, ((0, 0), (0, more)))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return tensor_of(array)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]
