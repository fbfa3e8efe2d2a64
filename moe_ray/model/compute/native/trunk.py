"""A trunk of native kernels on a CPU: one call a layer, hidden states in float32.

A token's result does not depend on its neighbours in the batch, nor on how its prompt was cut into chunks: every sum
runs in one fixed order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.native.cascade import shared_positions
from moe_ray.model.compute.native.expert import NativeFFN
from moe_ray.model.compute.native.held_form import HeldForm, form_of, hold
from moe_ray.model.compute.native.trunk_adapters import NativeStepAdapters, TrunkAdapter
from moe_ray.model.config_parts import LATENT_EPS
from moe_ray.model.layers import rope_table
from moe_ray.model.lora.adapter_file import Adapter
from moe_ray.model.matrix import FloatMatrix, Matrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import QKV_BIASES, LatentWeights, LayerWeights, TrunkWeights
from moe_ray.native.gating import PANEL
from moe_ray.native.host import DTYPE_CODES
from moe_ray.native.kernels import Kernels, Layer, ModelShape, Packed, StepInputs

HeldT = TypeVar("HeldT", torch.Tensor, Packed)


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The expert of a layer that every token goes to, or what a layer without experts has in their stead."""

    ffn: NativeFFN
    share: Packed | None  # [1, D]: the sigmoid of its product with a row is how much of the expert counts; None: all


class NativeTrunk:
    """`TrunkCompute` by the native kernels."""

    def __init__(
        self, weights: TrunkWeights, max_model_len: int, kernels: Kernels, dtype: str, quantize: str | None = None
    ) -> None:
        """Read and pack the weights. `dtype`: of rows, and of a KV cache without scales. Raises `CheckpointError`.

        `quantize`: hold attention's matrices and the head in fewer bits, a name of `held.GROUPINGS`.
        """
        self.config, self.kernels = weights.config, kernels
        c = self.config
        self.dtype_code, self.dtype = DTYPE_CODES[dtype], weights.dtype
        self._dtype, self._quantize = dtype, quantize
        self._held: list[torch.Tensor | Packed] = []
        self._adapters: dict[int, TrunkAdapter] = {}
        self.held: dict[str, None] = {}
        """What the matrices are held as, in words."""
        self.shared: list[SharedExpert | None] = []
        """Of each layer; None where it has none."""
        embed = weights.embed()  # [V, D]
        self.layers = [self._layer(weights, index) for index in range(c.num_hidden_layers)]
        self.norm = self._keep(weights.norm().float())
        head = weights.head()
        # A tied embedding is kept in the head's packed form only, and rows are looked up there.
        self.embed = None if head is None else self._keep(embed)
        self.head = self._floats(embed) if head is None else self._matrix([head])
        table = rope_table(c, max_model_len, torch.float32, weights.device)
        self.rope = table[..., : c.rope_dim // 2].contiguous()  # [max_model_len, 2, rope_dim / 2]
        self.shape = shape_of(c)
        self.nbytes = sum(each.nbytes for each in self._held)

    def begin(self, batch: Batch, cache: KVCacheView) -> NativePass:
        """Look the batch's tokens up and plan its attention."""
        return NativePass(self, batch, cache)

    def add_adapter(self, adapter: Adapter) -> None:
        held = TrunkAdapter(adapter, self.config, self.kernels, self._dtype)
        for shared, part in zip(self.shared, held.shared, strict=True):
            if shared is not None:
                shared.ffn.add_adapter(adapter.adapter_id, part)
        self._adapters[adapter.adapter_id] = held

    def remove_adapter(self, adapter_id: int) -> None:
        self._adapters.pop(adapter_id, None)
        for shared in self.shared:
            if shared is not None:
                shared.ffn.remove_adapter(adapter_id)

    @property
    def adapter_bytes(self) -> int:
        of_shared = sum(shared.ffn.adapter_bytes for shared in self.shared if shared is not None)
        return of_shared + sum(adapter.nbytes for adapter in self._adapters.values())

    @property
    def adapter_ids(self) -> frozenset[int]:
        return frozenset(self._adapters)

    def step_adapters(self, batch: Batch) -> NativeStepAdapters:
        """The adapters of a batch. Raises `AdapterNotHeld`."""
        return NativeStepAdapters(batch, self._adapters)

    def lookup(self, token_ids: list[int]) -> torch.Tensor:
        """Embeddings, float32 [T, D], before they are multiplied."""
        ids = torch.tensor(token_ids)
        return self.kernels.unpack_rows(self.head, ids) if self.embed is None else F.embedding(ids, self.embed).float()

    def _layer(self, weights: TrunkWeights, index: int) -> Layer:
        w = weights.layer(index)
        norms = [self._keep(norm.float()).data_ptr() for norm in (w.input_norm, w.post_norm)]
        qkv = self._matrix(w.qkv if w.latent is None else w.latent.down)
        gate = self._floats(w.gate).address if len(w.gate) else None
        layer = Layer(*norms, qkv.address, self._matrix([w.out]).address, gate)
        if w.latent is not None:
            self._add_latent(layer, w.latent)
        vectors = {role: vector.float() for role, vector in w.vectors.items() if role != "shared_share"}
        if biases := [vectors.pop(role) for role in QKV_BIASES if role in vectors]:
            layer.qkv_bias = self._keep(torch.cat(biases)).data_ptr()
        if "router_bias" in vectors:
            vectors["router_bias"] = F.pad(vectors["router_bias"], (0, -self.config.num_local_experts % PANEL))
        layer.full = index in self.config.full_layers
        if (correction := vectors.pop("router_correction", None)) is not None:
            layer.correction = self._keep(correction).data_ptr()
        for role, vector in vectors.items():
            setattr(layer, role, self._keep(vector).data_ptr())
        self.shared.append(self._shared(w) if w.shared else None)
        return layer

    def _add_latent(self, layer: Layer, latent: LatentWeights) -> None:
        """Hold what latent attention has beside `down`. The matrices of all heads lie one above the other."""
        by_head = (latent.keys.flatten(0, 1), latent.values.flatten(0, 1))
        layer.keys, layer.values = (self._matrix([FloatMatrix(tensor)]).address for tensor in by_head)
        layer.kv_latent_norm = self._keep(latent.kv_norm.float()).data_ptr()
        if latent.q_up is not None and latent.q_norm is not None:
            layer.q_up = self._matrix([latent.q_up]).address
            layer.q_latent_norm = self._keep(latent.q_norm.float()).data_ptr()

    def _shared(self, w: LayerWeights) -> SharedExpert:
        """Read the shared expert of a layer, or what is in its experts' stead."""
        gate, up, down = w.shared
        joined = form_of([gate, up], self._dtype, self._quantize)
        single = form_of([down], self._dtype, self._quantize, wide_inputs=True)
        self.held |= dict.fromkeys((str(joined), str(single)))
        w13, w2 = hold(self.kernels, joined, [gate], [up]), hold(self.kernels, single, [down])
        ffn = NativeFFN(self._keep(w13), self._keep(w2), self.kernels, self._dtype)
        share = w.vectors.get("shared_share")
        return SharedExpert(ffn, None if share is None else self._floats(share))

    def _matrix(self, rows: Sequence[Matrix]) -> Packed:
        form = form_of(rows, self._dtype, self._quantize, wide_inputs=True)
        self.held[str(form)] = None
        return self._keep(hold(self.kernels, form, rows))

    def _floats(self, tensor: torch.Tensor) -> Packed:
        return self._keep(hold(self.kernels, HeldForm(self._dtype), [FloatMatrix(tensor)]))

    def _keep(self, held: HeldT) -> HeldT:
        self._held.append(held)
        return held


def shape_of(c: ModelConfig) -> ModelShape:
    """What the kernels are told of a model."""
    shape = ModelShape(
        *(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim),
        *(c.num_local_experts, c.num_experts_per_tok, c.rms_norm_eps, c.attention_scale, c.sliding_window or 0),
        *(c.residual_multiplier, c.router.renormalise, c.family.qk_norm == "whole", c.clip_qkv or 0.0),
        *(c.router.groups, c.router.groups_chosen, c.router.group_scores == "best two", c.router.sigmoid),
        *(c.router.scale, LATENT_EPS),
    )
    shape.rope_dim = c.rope_dim
    if c.latent is not None:
        shape.kv_rank, shape.q_rank = c.latent.kv_rank, c.latent.q_rank or 0
        shape.nope, shape.value = c.latent.nope, c.latent.value
    return shape


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers are; None for none."""
    return None if tensor is None else tensor.data_ptr()


class NativePass:
    """`Pass` by the native kernels."""

    def __init__(self, trunk: NativeTrunk, batch: Batch, cache: KVCacheView) -> None:
        self._trunk, self._cache = trunk, cache
        self._adapters = trunk.step_adapters(batch)
        self._hidden = trunk.lookup(batch.token_ids)  # [T, D]
        if self._adapters.runs:
            self._adapters.embed(torch.tensor(batch.token_ids), self._hidden)
        self._hidden *= trunk.config.embedding_multiplier
        self._rows = self._hidden
        """What the layer's router saw, and its shared expert sees."""
        tables = [seq.block_table for seq in batch.sequences]
        lengths = np.diff(batch.query_start)
        self._positions = np.array(batch.positions, dtype=np.int32)
        self._slots = np.array(batch.slot_mapping, dtype=np.int32)
        self._sequence = np.repeat(np.arange(len(tables), dtype=np.int32), lengths)
        self._tables = np.fromiter(chain.from_iterable(tables), dtype=np.int32)
        self._table_start = np.array([0, *accumulate(map(len, tables))][:-1], dtype=np.int64)
        arrays = (self._positions, self._slots, self._sequence, self._tables, self._table_start)
        self._step = StepInputs(
            *(batch.num_tokens, cache.block_size), *(array.ctypes.data for array in arrays), trunk.rope.data_ptr()
        )
        computed = [context - length for context, length in zip(batch.context_lens, lengths.tolist(), strict=True)]
        self._cascade = shared_positions(tables, computed, cache.block_size) if len(tables) > 1 else None
        if self._cascade is not None:
            self._step.leader, self._step.shared = (array.ctypes.data for array in self._cascade)
        runs = self._adapters.layer_runs
        self._step.runs, self._step.num_runs = ctypes.addressof(runs), len(runs)
        self._counts = np.zeros(trunk.config.num_local_experts, dtype=np.int64)

    def route(self, layer: int) -> moe.Routed | None:
        """Add the layer's self-attention to the hidden states; normalise and route them; None: it has no experts."""
        trunk, kernels = self._trunk, self._trunk.kernels
        self._adapters.at_layer(layer)
        kv, pointers = self._cache.layer(layer), trunk.layers[layer]
        pointers.k_cache, pointers.v_cache = kv.k.data_ptr(), kv.v.data_ptr()
        pointers.k_scales, pointers.v_scales = address(kv.k_scales), address(kv.v_scales)
        pointers.float8 = kv.k.dtype == torch.float8_e4m3fn
        tokens, width = self._hidden.shape
        rows = torch.empty((tokens * trunk.shape.top_k, width), dtype=trunk.dtype)
        weights = torch.empty(rows.shape[0])
        row_of = torch.empty((tokens, trunk.shape.top_k), dtype=torch.int32)
        kernels.layer_front(
            *(
                kernels.pool,
                trunk.dtype_code,
                ctypes.byref(trunk.shape),
                ctypes.byref(pointers),
                ctypes.byref(self._step),
            ),
            *(self._hidden.data_ptr(), rows.data_ptr(), weights.data_ptr()),
            *(self._counts.ctypes.data, row_of.data_ptr()),
        )
        if pointers.gate is None:
            self._rows = rows[:tokens]
            return None
        if trunk.shared[layer] is not None:
            self._rows = rows[row_of[:, 0]]
        return moe.Routed(rows, weights, self._counts.tolist(), row_of, self._adapters.token_adapters(layer))

    def add_shared(self, layer: int) -> None:
        """Add what the layer's shared expert makes of the rows that were routed, or what is in its experts' stead."""
        shared = self._trunk.shared[layer]
        if shared is None:
            return
        share = torch.ones((len(self._rows), 1))
        if shared.share is not None:
            share = self._trunk.kernels.linear(self._rows, shared.share)
            self._adapters.add_share(layer, self._rows, share)
            share.sigmoid_()
        self._hidden += shared.ffn.forward(self._rows, share[:, 0], self._adapters.shared_runs)

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`."""
        self._trunk.kernels.combine(self._hidden, rows, routed.row_of)

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch."""
        trunk = self._trunk
        which = torch.tensor(rows, dtype=torch.int64)
        return self._logits(which, rows).div_(trunk.config.logits_scaling)

    def _logits(self, which: torch.Tensor, rows: list[int]) -> torch.Tensor:
        trunk = self._trunk
        if not self._adapters.runs:
            return trunk.kernels.head(self._hidden, which, trunk.norm, trunk.config.rms_norm_eps, trunk.head)
        computed, start = [], 0
        for count, matrix, runs in self._adapters.heads(rows, trunk.head):
            some = which[start : start + count]
            eps = trunk.config.rms_norm_eps
            computed.append(trunk.kernels.head(self._hidden, some, trunk.norm, eps, matrix, runs))
            start += count
        return torch.cat(computed) if computed else torch.empty((0, trunk.config.vocab_size))
