"""The trunk's tensors, read from a checkpoint when they are asked for: so that whoever repacks them holds them once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ray.model.checkpoint import Checkpoint, Progress, trunk_specs


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its experts."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, D]
    out: torch.Tensor  # [D, heads * head_dim]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.input_norm, self.qkv, self.out, self.post_norm, self.gate))


class TrunkWeights:
    """Reads the trunk's own tensors of one checkpoint, each once. Every method may raise `CheckpointError`."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        """Check that all are there before any is read."""
        self.config, self.dtype, self.device = checkpoint.config, dtype, device
        self._checkpoint, self._progress = checkpoint, progress
        self._specs = {spec.name: spec for spec in trunk_specs(checkpoint.config)}
        self._total, self._start = checkpoint.check(iter(self._specs.values())), checkpoint.bytes_read

    def embed(self) -> torch.Tensor:
        """[V, D]"""
        return self._read("model.embed_tokens.weight")

    def layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        return LayerWeights(
            input_norm=self._read(prefix + "input_layernorm.weight"),
            qkv=torch.cat([self._read(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]),
            out=self._read(prefix + "self_attn.o_proj.weight"),
            post_norm=self._read(prefix + "post_attention_layernorm.weight"),
            gate=self._read(prefix + "block_sparse_moe.gate.weight"),
        )

    def norm(self) -> torch.Tensor:
        """[D]"""
        return self._read("model.norm.weight")

    def head(self) -> torch.Tensor | None:
        """[V, D]; None: the embedding is the head."""
        return None if self.config.tie_word_embeddings else self._read("lm_head.weight")

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.read(self._specs[name], self.dtype, self.device)
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._start, self._total)
        return tensor
