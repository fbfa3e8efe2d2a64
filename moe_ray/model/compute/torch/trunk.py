"""A trunk of torch tensors: its operations are given, by default plain torch, numerically as transformers computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import FFN, HeldMatrix, KVCacheView, Pass
from moe_ray.model.compute.torch.latent import LatentTensors
from moe_ray.model.compute.torch.low_rank import Joins, TorchAdapter, TorchStepAdapters
from moe_ray.model.compute.torch.ops import Attending, StepAttention, TorchOps, TrunkOps, add
from moe_ray.model.compute.torch.recorded import Recordings
from moe_ray.model.compute.torch.recorded_step import of_tokens
from moe_ray.model.compute.torch.recorders import Recorder
from moe_ray.model.families import TrunkRole
from moe_ray.model.layers import rms_norm, rope_table
from moe_ray.model.lora.adapter_file import Adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import QKV_BIASES, TrunkWeights

MatrixT = TypeVar("MatrixT", bound=HeldMatrix)


@dataclass(frozen=True, slots=True)
class LayerTensors(Generic[MatrixT]):
    """One decoder layer without its experts. `MatrixT`: how the matrices that may be quantised are held."""

    input_norm: torch.Tensor  # [D]
    qkv: MatrixT  # [(heads + 2 kv_heads) * head_dim, D]; without rows where attention is `latent`
    out: MatrixT  # [D, heads * head_dim]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]; without rows where the layer has no experts
    qkv_bias: torch.Tensor | None = None  # [(heads + 2 kv_heads) * head_dim]
    vectors: Mapping[TrunkRole, torch.Tensor] = field(default_factory=dict)
    """As `LayerWeights` has them."""
    shared: FFN | None = None
    latent: LatentTensors | None = None

    @staticmethod
    def read(weights: TrunkWeights, index: int, ops: TrunkOps | None = None) -> LayerTensors[HeldMatrix]:
        """`ops`: what holds matrices; default: plain torch, as tensors. Raises `CheckpointError`."""
        ops = ops or TorchOps(weights.config, weights.device)
        w = weights.layer(index)
        biases = [w.vectors[role] for role in QKV_BIASES if role in w.vectors]
        shared = ops.hold_shared(w.shared, weights) if w.shared else None
        latent = None
        if w.latent is not None and weights.config.latent is not None:
            latent = LatentTensors.read(weights.config.latent, weights, w.latent)
        return LayerTensors(
            w.input_norm,
            ops.hold(w.qkv, weights) if w.qkv else w.input_norm.new_empty(0, len(w.input_norm)),
            *(ops.hold([w.out], weights), w.post_norm, w.gate),
            torch.cat(biases) if biases else None,
            w.vectors,
            shared,
            latent,
        )

    @property
    def nbytes(self) -> int:
        held = (self.input_norm, self.qkv, self.out, self.post_norm, self.gate, self.shared, self.latent)
        return sum(each.nbytes for each in (*held, *self.vectors.values()) if each is not None)


class TorchTrunk:
    """`TrunkCompute` of torch tensors."""

    def __init__(
        self,
        weights: TrunkWeights,
        max_model_len: int,
        static_shapes: bool | None = None,
        ops: TrunkOps | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Read the weights. Raises `CheckpointError`.

        `static_shapes`: pad decodes (see `plan`); default: on a card, and where they are recorded. `ops`: what
        computes; default: plain torch. `recorder`: records steps of decoding; None: each is launched as it comes.
        """
        self.config, self.device = weights.config, weights.device
        self.ops = TorchOps(self.config, self.device) if ops is None else ops
        padded = self.device.type == "cuda" or recorder is not None
        self.static_shapes = padded if static_shapes is None else static_shapes
        self.adapters: dict[int, TorchAdapter] = {}
        self.joins = Joins()
        self._recordings = None if recorder is None else Recordings(recorder)
        self.embed = weights.embed()  # [V, D]
        self.layers = [LayerTensors.read(weights, index, self.ops) for index in range(self.config.num_hidden_layers)]
        self.norm = weights.norm()  # [D]
        self.norm_bias, self.head_bias = weights.optional("norm_bias"), weights.optional("head_bias")  # [D], [V]
        head = weights.head()
        self.head: HeldMatrix = self.embed if head is None else self.ops.hold([head], weights)  # [V, D]
        self.cos_sin = rope_table(self.config, max_model_len, weights.dtype, weights.device)
        shared = 0 if head is None else self.head.nbytes
        self.nbytes = self.embed.nbytes + self.norm.nbytes + shared + sum(layer.nbytes for layer in self.layers)

    def begin(self, batch: Batch, cache: KVCacheView) -> Pass:
        """Look the batch's tokens up and plan its attention."""
        step = self.ops.plan(batch, cache, self.static_shapes)
        adapters = TorchStepAdapters(batch, self.adapters, self.joins, self.device)

        def launched() -> TorchPass:
            return TorchPass(self, step, adapters, cache)

        if self._recordings is not None and not adapters.runs:
            recorded = self._recordings.begin(launched, step, cache)
            if recorded is not None:
                return recorded
        return launched()

    def add_adapter(self, adapter: Adapter) -> None:
        c = self.config
        kv = c.num_key_value_heads * c.head_dim
        outputs = ((c.num_attention_heads * c.head_dim, kv, kv), c.num_local_experts)
        self.joins.forget()
        held = TorchAdapter(adapter, [outputs] * len(self.layers), self.embed)
        for layer, part in zip(self.layers, held.shared, strict=True):
            if layer.shared is not None:
                layer.shared.add_adapter(adapter.adapter_id, part)
        self.adapters[adapter.adapter_id] = held

    def remove_adapter(self, adapter_id: int) -> None:
        self.joins.forget()
        self.adapters.pop(adapter_id, None)
        for layer in self.layers:
            if layer.shared is not None:
                layer.shared.remove_adapter(adapter_id)

    @property
    def adapter_bytes(self) -> int:
        of_shared = sum(layer.shared.adapter_bytes for layer in self.layers if layer.shared is not None)
        return of_shared + sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def adapter_ids(self) -> frozenset[int]:
        return frozenset(self.adapters)


class TorchPass:
    """`Pass` of torch tensors. Nothing in it waits for the device; a padded batch has P tokens, the first T count."""

    def __init__(self, trunk: TorchTrunk, step: StepAttention, adapters: TorchStepAdapters, cache: KVCacheView) -> None:
        """Look the step's tokens up."""
        self._trunk, self._step, self._adapters, self._cache = trunk, step, adapters, cache
        self.embed()

    def embed(self) -> None:
        """Begin: with the embeddings of the step's tokens."""
        trunk, ids = self._trunk, self._step.token_ids
        embedded = self._adapters.embed(ids, F.embedding(ids, trunk.embed))
        self._hidden = embedded * trunk.config.embedding_multiplier  # [P, D]
        self._rows = self._hidden
        """What the layer's router saw, and its shared expert sees."""
        self._cos_sin = trunk.cos_sin[self._step.positions]
        self._row_of = ids.new_empty(0)
        """Of what was routed last, [P, K]."""

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """All that the next method goes on from."""
        return self._hidden, self._rows, self._cos_sin, self._row_of

    @state.setter
    def state(self, state: tuple[torch.Tensor, ...]) -> None:
        self._hidden, self._rows, self._cos_sin, self._row_of = state

    def has_shared(self, layer: int) -> bool:
        """Whether `add_shared` adds anything."""
        return self._trunk.layers[layer].shared is not None

    def route(self, layer: int) -> moe.Routed | None:
        """Add the layer's self-attention to the hidden states; normalise and route them; None: it has no experts."""
        routed = self.route_all(layer)
        if routed is None:
            return None
        tensors = of_tokens(routed.tensors(), self._step.num_tokens)
        return moe.Routed(*tensors, self._adapters.token_adapters(layer))

    def route_all(self, layer: int) -> moe.Routed | None:
        """The same with what pads the batch behind its rows, [P * K, D]."""
        ops, w = self._trunk.ops, self._trunk.layers[layer]
        added = self._adapters.layer(layer)
        attended = self._attend(layer)
        out = ops.linear(attended, w.out, w.vectors.get("out_bias"))
        out = self._adapters.add(out, attended, [each.out for each in added])
        self._hidden, rows = ops.add_normalise(self._hidden, out, w.post_norm, w.vectors.get("post_norm_bias"))
        self._rows = rows
        if not len(w.gate):
            return None
        router = ops.linear(rows.to(w.gate.dtype), w.gate, w.vectors.get("router_bias"))
        logits = self._adapters.add(router, rows, [each.gate for each in added])
        routed = ops.route(rows, logits, w.vectors.get("router_correction"), self._step.real)
        self._row_of = routed.row_of
        return routed

    def _attend(self, layer: int) -> torch.Tensor:
        """What the layer's heads attend to, [P, inputs of `out`]."""
        c, w, cache = self._trunk.config, self._trunk.layers[layer], self._cache.layer(layer)
        ops, heads, kv_heads = self._trunk.ops, c.num_attention_heads, c.num_key_value_heads
        how = Attending(c.attention_multiplier, c.window_of(layer), w.vectors.get("sinks"))
        _, normed = ops.add_normalise(self._hidden, None, w.input_norm, w.vectors.get("input_norm_bias"))
        if w.latent is not None:
            queries, keys = w.latent.project(normed, self._cos_sin)
            return w.latent.outputs(self._step.attend_latents(queries, keys, cache, how))
        qkv = ops.linear(normed, w.qkv, w.qkv_bias)
        qkv = self._adapters.add(qkv, normed, [each.qkv for each in self._adapters.layer(layer)])
        qkv = qkv.view(-1, heads + 2 * kv_heads, c.head_dim)
        normed_qk, values = _norm_qk(ops, c, w, qkv[:, : heads + kv_heads]), qkv[:, heads + kv_heads :]
        if c.clip_qkv is not None:
            normed_qk, values = (each.clamp(-c.clip_qkv, c.clip_qkv) for each in (normed_qk, values))
        return self._step.attend(normed_qk, values, self._cos_sin, cache, how).flatten(1)

    def add_shared(self, layer: int) -> None:
        """Add what the layer's shared expert makes of the rows that were routed, times the sigmoid of its share."""
        w = self._trunk.layers[layer]
        if w.shared is None:
            return
        share = self._rows.new_ones(len(self._rows))
        if "shared_share" in w.vectors:
            added = [each.share for each in self._adapters.layer(layer)]
            product = self._trunk.ops.linear(self._rows, w.vectors["shared_share"])
            share = self._adapters.add(product, self._rows, added).sigmoid()[:, 0]
        made = w.shared.forward(self._rows, share.float(), self._adapters.shared_runs)
        self._hidden = add(self._trunk.config, self._hidden, made)

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`."""
        self._hidden = self._trunk.ops.combine(self._hidden, routed.brought(rows), routed.row_of, self._step.real)

    def combine_all(self, rows: torch.Tensor) -> None:
        """Add what they made of what `route_all` returned last: rows [P * K, D], of which the first T * K count."""
        self._hidden = self._trunk.ops.combine(self._hidden, rows, self._row_of, self._step.real)

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch.

        A step that may be recorded has them computed for all positions, as its recording has: by a library they need
        not be the same bits for fewer.
        """
        which = torch.tensor(rows, dtype=torch.long).to(self._trunk.device, non_blocking=True)
        if self._step.key is not None and not self._adapters.runs:
            return self.all_logits()[which]
        return self._logits(rows, self._hidden[which])

    def all_logits(self) -> torch.Tensor:
        """Logits float32 [P, V] of all positions."""
        return self._logits(range(len(self._hidden)), self._hidden)

    def _logits(self, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        trunk = self._trunk
        _, picked = trunk.ops.add_normalise(hidden, None, trunk.norm, trunk.norm_bias)
        logits = self._adapters.logits(rows, picked, trunk.head, trunk.head_bias, trunk.ops.linear)
        return logits.float() / trunk.config.logits_scaling


def _norm_qk(ops: TrunkOps, config: ModelConfig, w: LayerTensors, qk: torch.Tensor) -> torch.Tensor:
    """Queries and keys [P, heads + kv_heads, head_dim], normalised where the family does so."""
    if config.family.qk_norm is None:
        return qk
    if config.family.qk_norm == "head":
        return ops.normalise_heads(qk, w.vectors["q_norm"], w.vectors["k_norm"])
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    parts = [(qk[:, :heads], w.vectors["q_norm"]), (qk[:, heads:], w.vectors["k_norm"])]
    return torch.cat([rms_norm(part.flatten(1), weight, eps).view(part.shape) for part, weight in parts], 1)
