"""A trunk of plain torch operations: any device and dtype, numerically as transformers computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.torch.attention import attend
from moe_ray.model.compute.torch.low_rank import Joins, TorchAdapter, TorchStepAdapters
from moe_ray.model.compute.torch.plan import plan_step
from moe_ray.model.layers import apply_rope, rms_norm, rope_table
from moe_ray.model.lora.adapter_file import Adapter
from moe_ray.model.trunk_weights import TrunkWeights


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One decoder layer without its experts."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, D]
    out: torch.Tensor  # [D, heads * head_dim]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]

    @staticmethod
    def read(weights: TrunkWeights, index: int) -> LayerTensors:
        """Raises `CheckpointError`."""
        w = weights.layer(index)
        return LayerTensors(w.input_norm, weights.tensor(*w.qkv), weights.tensor(w.out), w.post_norm, w.gate)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.input_norm, self.qkv, self.out, self.post_norm, self.gate))


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
        self._hidden = self._adapters.embed(ids, F.embedding(ids, trunk.embed))  # [P, D]
        self._cos_sin = trunk.cos_sin[self._plan.positions]

    def route(self, layer: int) -> moe.Routed:
        """Add the layer's self-attention to the hidden states; normalise and route them."""
        c, w = self._trunk.config, self._trunk.layers[layer]
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        added = self._adapters.layer(layer)
        normed = rms_norm(self._hidden, w.input_norm, c.rms_norm_eps)
        qkv = self._adapters.add(F.linear(normed, w.qkv), normed, [each.qkv for each in added])
        qkv = qkv.view(-1, heads + 2 * kv_heads, c.head_dim)
        rotated = apply_rope(qkv[:, : heads + kv_heads], self._cos_sin)
        attended = attend(
            self._plan, rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :], self._cache.layer(layer)
        )
        attended = attended.flatten(1)
        out = self._adapters.add(F.linear(attended, w.out), attended, [each.out for each in added])
        self._hidden = self._hidden + out
        rows = rms_norm(self._hidden, w.post_norm, c.rms_norm_eps)
        logits = self._adapters.add(F.linear(rows, w.gate), rows, [each.gate for each in added])
        chosen, weights = moe.choose(logits, c.num_experts_per_tok, c.router)
        tokens = self._plan.num_tokens
        routed = moe.group(rows[:tokens], chosen[:tokens], weights[:tokens], c.num_local_experts)
        routed.token_adapters = self._adapters.token_adapters(layer)
        return routed

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`."""
        padding = self._hidden.shape[0] - self._plan.num_tokens
        row_of = F.pad(routed.row_of, (0, 0, 0, padding)) if padding else routed.row_of
        self._hidden = self._hidden + moe.combine(rows.to(self._hidden.device, non_blocking=True), row_of)

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch."""
        which = torch.tensor(rows, dtype=torch.long).to(self._trunk.device, non_blocking=True)
        picked = rms_norm(self._hidden[which], self._trunk.norm, self._trunk.config.rms_norm_eps)
        return self._adapters.logits(rows, picked, self._trunk.head).float()
