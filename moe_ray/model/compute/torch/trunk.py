"""A trunk of plain torch operations: any device and dtype, numerically as transformers computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.torch.attention import attend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.low_rank import Joins, TorchAdapter, TorchStepAdapters
from moe_ray.model.compute.torch.plan import plan_step
from moe_ray.model.families import TrunkRole
from moe_ray.model.layers import apply_rope, normalise, rms_norm, rope_table
from moe_ray.model.lora.adapter_file import Adapter
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import QKV_BIASES, TrunkWeights


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One decoder layer without its experts."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, D]
    out: torch.Tensor  # [D, heads * head_dim]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]
    qkv_bias: torch.Tensor | None = None  # [(heads + 2 kv_heads) * head_dim]
    vectors: Mapping[TrunkRole, torch.Tensor] = field(default_factory=dict)
    """As `LayerWeights` has them."""
    shared: TorchFFN | None = None

    @staticmethod
    def read(weights: TrunkWeights, index: int) -> LayerTensors:
        """Raises `CheckpointError`."""
        w = weights.layer(index)
        biases = [w.vectors[role] for role in QKV_BIASES if role in w.vectors]
        shared = None
        if w.shared:
            gate, up, down = map(weights.tensor, w.shared)
            shared = TorchFFN(gate, up, down, weights.config.hidden_act)
        return LayerTensors(
            *(w.input_norm, weights.tensor(*w.qkv), weights.tensor(w.out), w.post_norm, w.gate),
            torch.cat(biases) if biases else None,
            w.vectors,
            shared,
        )

    @property
    def nbytes(self) -> int:
        held = (self.input_norm, self.qkv, self.out, self.post_norm, self.gate, *self.vectors.values())
        return sum(t.nbytes for t in held) + (0 if self.shared is None else self.shared.nbytes)


class TorchTrunk:
    """`TrunkCompute` by torch."""

    def __init__(self, weights: TrunkWeights, max_model_len: int, static_shapes: bool | None = None) -> None:
        """Read the weights. `static_shapes`: pad decodes (see `plan`); default: on a card. Raises `CheckpointError`."""
        self.config, self.device = weights.config, weights.device
        self.static_shapes = self.device.type == "cuda" if static_shapes is None else static_shapes
        self.adapters: dict[int, TorchAdapter] = {}
        self.joins = Joins()
        self.embed = weights.embed()  # [V, D]
        self.layers = [LayerTensors.read(weights, index) for index in range(self.config.num_hidden_layers)]
        self.norm = weights.norm()  # [D]
        self.norm_bias, self.head_bias = weights.optional("norm_bias"), weights.optional("head_bias")  # [D], [V]
        head = weights.head()
        self.head = self.embed if head is None else weights.tensor(head)  # [V, D]
        self.cos_sin = rope_table(self.config, max_model_len, weights.dtype, weights.device)
        shared = 0 if head is None else self.head.nbytes
        self.nbytes = self.embed.nbytes + self.norm.nbytes + shared + sum(layer.nbytes for layer in self.layers)

    def begin(self, batch: Batch, cache: KVCacheView) -> TorchPass:
        """Look the batch's tokens up and plan its attention."""
        return TorchPass(self, batch, cache)

    def add_adapter(self, adapter: Adapter) -> None:
        c = self.config
        kv = c.num_key_value_heads * c.head_dim
        outputs = ((c.num_attention_heads * c.head_dim, kv, kv), c.num_local_experts)
        self.joins.forget()
        self.adapters[adapter.adapter_id] = TorchAdapter(adapter, [outputs] * len(self.layers), self.embed)

    def remove_adapter(self, adapter_id: int) -> None:
        self.joins.forget()
        self.adapters.pop(adapter_id, None)

    @property
    def adapter_bytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters.values())

    @property
    def adapter_ids(self) -> frozenset[int]:
        return frozenset(self.adapters)


class TorchPass:
    """`Pass` by torch. Nothing in it waits for the device; a padded batch has P tokens, of which the first T count."""

    def __init__(self, trunk: TorchTrunk, batch: Batch, cache: KVCacheView) -> None:
        self._trunk, self._cache = trunk, cache
        self._plan = plan_step(batch, cache, trunk.config.sliding_window, trunk.device, trunk.static_shapes)
        self._adapters = TorchStepAdapters(batch, trunk.adapters, trunk.joins, trunk.device)
        ids = self._plan.token_ids
        embedded = self._adapters.embed(ids, F.embedding(ids, trunk.embed))
        self._hidden = embedded * trunk.config.embedding_multiplier  # [P, D]
        self._rows = self._hidden
        """What the layer's router saw, and its shared expert sees."""
        self._cos_sin = trunk.cos_sin[self._plan.positions]

    def route(self, layer: int) -> moe.Routed:
        """Add the layer's self-attention to the hidden states; normalise and route them."""
        c, w = self._trunk.config, self._trunk.layers[layer]
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        added = self._adapters.layer(layer)
        normed = normalise(c, self._hidden, w.input_norm, w.vectors.get("input_norm_bias"))
        qkv = self._adapters.add(F.linear(normed, w.qkv, w.qkv_bias), normed, [each.qkv for each in added])
        qkv = qkv.view(-1, heads + 2 * kv_heads, c.head_dim)
        rotated = apply_rope(_norm_qk(c, w, qkv[:, : heads + kv_heads]), self._cos_sin)
        attended = attend(
            *(self._plan, rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]),
            self._cache.layer(layer),
            c.attention_multiplier,
        )
        attended = attended.flatten(1)
        out = F.linear(attended, w.out, w.vectors.get("out_bias"))
        self._add(self._adapters.add(out, attended, [each.out for each in added]))
        rows = self._rows = normalise(c, self._hidden, w.post_norm, w.vectors.get("post_norm_bias"))
        logits = self._adapters.add(F.linear(rows, w.gate), rows, [each.gate for each in added])
        chosen, weights = moe.choose(logits, c.num_experts_per_tok, c.router)
        tokens = self._plan.num_tokens
        routed = moe.group(rows[:tokens], chosen[:tokens], weights[:tokens], c.num_local_experts)
        routed.token_adapters = self._adapters.token_adapters(layer)
        return routed

    def add_shared(self, layer: int) -> None:
        """Add what the layer's shared expert makes of the rows that were routed, times the sigmoid of its share."""
        w = self._trunk.layers[layer]
        if w.shared is not None:
            share = F.linear(self._rows, w.vectors["shared_share"]).sigmoid()
            self._add(w.shared.forward(self._rows, share[:, 0]))

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`."""
        padding = self._hidden.shape[0] - self._plan.num_tokens
        row_of = F.pad(routed.row_of, (0, 0, 0, padding)) if padding else routed.row_of
        self._add(moe.combine(rows.to(self._hidden.device, non_blocking=True), row_of))

    def _add(self, rows: torch.Tensor) -> None:
        """Add what a part of the layer made, [P, D]."""
        self._hidden = self._hidden + rows * self._trunk.config.residual_multiplier

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch."""
        which = torch.tensor(rows, dtype=torch.long).to(self._trunk.device, non_blocking=True)
        trunk = self._trunk
        picked = normalise(trunk.config, self._hidden[which], trunk.norm, trunk.norm_bias)
        logits = self._adapters.logits(rows, picked, trunk.head, trunk.head_bias)
        return logits.float() / trunk.config.logits_scaling


def _norm_qk(config: ModelConfig, w: LayerTensors, qk: torch.Tensor) -> torch.Tensor:
    """Queries and keys [P, heads + kv_heads, head_dim], normalised where the family does so."""
    if config.family.qk_norm is None:
        return qk
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    parts = [(qk[:, :heads], w.vectors["q_norm"]), (qk[:, heads:], w.vectors["k_norm"])]
    if config.family.qk_norm == "head":
        return torch.cat([rms_norm(part, weight, eps) for part, weight in parts], 1)
    return torch.cat([rms_norm(part.flatten(1), weight, eps).view(part.shape) for part, weight in parts], 1)
