"""The trunk: embeddings, attention, norms, router and head. The experts are injected and may live anywhere."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.attention import AttentionPlan, KVCacheView, attend, plan_attention
from moe_ray.model.checkpoint import Checkpoint, Progress, trunk_specs
from moe_ray.model.layers import apply_rope, rms_norm, rope_table
from moe_ray.model.model_config import ModelConfig

ForwardSteps = Generator[None, None, torch.Tensor]
"""A forward pass that yields wherever it would wait for experts and returns the logits."""


@dataclass(frozen=True, slots=True)
class TrunkLayer:
    """One decoder layer without its experts."""

    index: int
    config: ModelConfig
    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, D]
    out: torch.Tensor  # [D, heads * head_dim]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]

    def attention(
        self,
        hidden: torch.Tensor,
        cos_sin: torch.Tensor,
        plan: AttentionPlan,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return hidden [T, D] plus its self-attention."""
        c = self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = F.linear(rms_norm(hidden, self.input_norm, c.rms_norm_eps), self.qkv).view(
            -1, heads + 2 * kv_heads, c.head_dim
        )
        rotated = apply_rope(qkv[:, : heads + kv_heads], cos_sin)
        attended = attend(plan, rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :], cache)
        return hidden + F.linear(attended.flatten(1), self.out)

    def dispatch(self, hidden: torch.Tensor, experts: moe.Experts) -> moe.Dispatched:
        """Normalise and route hidden [T, D]; scatter it to the experts."""
        rows = rms_norm(hidden, self.post_norm, self.config.rms_norm_eps)
        chosen, weights = moe.route(rows, self.gate, self.config.num_experts_per_tok)
        return moe.dispatch(experts, self.index, rows, chosen, weights, self.config.num_local_experts)


class Trunk:
    """The shared part of a Mixtral-format model, in evaluation mode. Used by one thread at a time."""

    def __init__(
        self,
        config: ModelConfig,
        embed: torch.Tensor,
        layers: Sequence[TrunkLayer],
        norm: torch.Tensor,
        head: torch.Tensor,
        experts: moe.Experts,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.device = embed.device
        self.dtype = embed.dtype
        self._embed, self._layers, self._norm, self._head = embed, layers, norm, head
        self._experts = experts
        self._cos_sin = rope_table(config, max_model_len, embed.dtype, embed.device)

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        experts: moe.Experts,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        progress: Progress | None = None,
    ) -> Trunk:
        """Read the trunk's own tensors only. Raises `CheckpointError`."""
        config = checkpoint.config
        specs = {spec.name: spec for spec in trunk_specs(config)}
        total, start = checkpoint.check(iter(specs.values())), checkpoint.bytes_read

        def read(name: str) -> torch.Tensor:
            tensor = checkpoint.read(specs[name], dtype, device)
            if progress is not None:
                progress(checkpoint.bytes_read - start, total)
            return tensor

        embed = read("model.embed_tokens.weight")
        layers = []
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            qkv = [read(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
            layers.append(
                TrunkLayer(
                    index=index,
                    config=config,
                    input_norm=read(prefix + "input_layernorm.weight"),
                    qkv=torch.cat(qkv),
                    out=read(prefix + "self_attn.o_proj.weight"),
                    post_norm=read(prefix + "post_attention_layernorm.weight"),
                    gate=read(prefix + "block_sparse_moe.gate.weight"),
                )
            )
        norm = read("model.norm.weight")
        head = embed if config.tie_word_embeddings else read("lm_head.weight")
        return Trunk(config, embed, layers, norm, head, experts, max_model_len)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        tensors = [self._embed, self._norm] if self._head is self._embed else [self._embed, self._norm, self._head]
        for layer in self._layers:
            tensors += [layer.input_norm, layer.qkv, layer.out, layer.post_norm, layer.gate]
        return sum(t.nbytes for t in tensors)

    def forward(self, batch: Batch, cache: KVCacheView) -> ForwardSteps:
        """Run one batch; a generator that yields where it waits for experts (see `interleave`).

        Returns float32 logits [S', V] of the batch's sampled positions, in sequence order.
        Raises `ExpertUnavailable` when an expert does not answer.
        """
        plan = plan_attention(batch, cache.block_size, self.config.sliding_window, self.device)
        hidden = F.embedding(torch.tensor(batch.token_ids, device=self.device), self._embed)  # [T, D]
        cos_sin = self._cos_sin[plan.positions]
        for layer in self._layers:
            hidden = layer.attention(hidden, cos_sin, plan, cache.layer(layer.index))
            dispatched = layer.dispatch(hidden, self._experts)
            try:
                yield
                hidden = hidden + moe.combine(dispatched)
            finally:
                dispatched.pending.abandon()  # nothing, unless this pass is being given up
        last = [end - 1 for end, sampled in zip(batch.query_start[1:], batch.sample, strict=True) if sampled]
        rows = rms_norm(
            hidden[torch.tensor(last, dtype=torch.long, device=self.device)], self._norm, self.config.rms_norm_eps
        )
        return F.linear(rows, self._head).float()


def interleave(passes: Sequence[ForwardSteps]) -> list[torch.Tensor]:
    """Run forward passes in turns: while one waits for its experts, the next computes. Results in order.

    Micro-batch "ping-pong" of MegaScale-Infer (arXiv:2504.02263). Whatever one of them raises ends all.
    """
    results: list[torch.Tensor | None] = [None] * len(passes)
    live = list(enumerate(passes))
    try:
        while live:
            still = []
            for i, steps in live:
                try:
                    next(steps)
                    still.append((i, steps))
                except StopIteration as stop:
                    results[i] = stop.value
            live = still
    finally:
        for steps in passes:
            steps.close()
    return [result for result in results if result is not None]
