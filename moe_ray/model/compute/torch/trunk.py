"""A trunk of plain torch operations: any device and dtype, numerically as transformers computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import KVCacheView
from moe_ray.model.compute.torch.attention import attend, plan_attention
from moe_ray.model.layers import apply_rope, rms_norm, rope_table
from moe_ray.model.trunk_weights import TrunkWeights


class TorchTrunk:
    """`TrunkCompute` by torch."""

    def __init__(self, weights: TrunkWeights, max_model_len: int) -> None:
        """Read the weights. Raises `CheckpointError`."""
        self.config, self.device = weights.config, weights.device
        self.embed = weights.embed()  # [V, D]
        self.layers = [weights.layer(index) for index in range(self.config.num_hidden_layers)]
        self.norm = weights.norm()  # [D]
        head = weights.head()
        self.head = self.embed if head is None else head  # [V, D]
        self.cos_sin = rope_table(self.config, max_model_len, weights.dtype, weights.device)
        shared = 0 if head is None else head.nbytes
        self.nbytes = self.embed.nbytes + self.norm.nbytes + shared + sum(layer.nbytes for layer in self.layers)

    def begin(self, batch: Batch, cache: KVCacheView) -> TorchPass:
        """Look the batch's tokens up and plan its attention."""
        return TorchPass(self, batch, cache)


class TorchPass:
    """`Pass` by torch."""

    def __init__(self, trunk: TorchTrunk, batch: Batch, cache: KVCacheView) -> None:
        self._trunk, self._cache = trunk, cache
        self._plan = plan_attention(batch, cache.block_size, trunk.config.sliding_window, trunk.device)
        self._hidden = F.embedding(torch.tensor(batch.token_ids, device=trunk.device), trunk.embed)  # [T, D]
        self._cos_sin = trunk.cos_sin[self._plan.positions]

    def route(self, layer: int) -> moe.Routed:
        """Add the layer's self-attention to the hidden states; normalise and route them."""
        c, w = self._trunk.config, self._trunk.layers[layer]
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = F.linear(rms_norm(self._hidden, w.input_norm, c.rms_norm_eps), w.qkv)
        qkv = qkv.view(-1, heads + 2 * kv_heads, c.head_dim)
        rotated = apply_rope(qkv[:, : heads + kv_heads], self._cos_sin)
        attended = attend(
            self._plan, rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :], self._cache.layer(layer)
        )
        self._hidden = self._hidden + F.linear(attended.flatten(1), w.out)
        rows = rms_norm(self._hidden, w.post_norm, c.rms_norm_eps)
        chosen, weights = moe.route(rows, w.gate, c.num_experts_per_tok, c.router)
        return moe.group(rows, chosen, weights, c.num_local_experts)

    def combine(self, routed: moe.Routed, rows: torch.Tensor) -> None:
        """Add what the experts made of `routed`."""
        self._hidden = self._hidden + moe.combine(rows.to(self._hidden.device), routed.row_of)

    def logits(self, rows: list[int]) -> torch.Tensor:
        """Logits float32 [len(rows), V] of these flat positions of the batch."""
        picked = self._hidden[torch.tensor(rows, dtype=torch.long, device=self._trunk.device)]
        return F.linear(rms_norm(picked, self._trunk.norm, self._trunk.config.rms_norm_eps), self._trunk.head).float()
