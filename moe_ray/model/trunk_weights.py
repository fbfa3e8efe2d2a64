"""The trunk's weights, read from a checkpoint when they are asked for: a backend that repacks them holds them once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.families import Role
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_trunk


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
    """Reads the trunk's own weights of one checkpoint, each once. Every method may raise `CheckpointError`."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        """Check that all are there before any is read; warn of tensors that nothing computes with."""
        check_surplus(checkpoint)
        self.config = config_of_trunk(checkpoint)
        self.dtype = dtype
        self.device = device
        self._checkpoint = checkpoint
        self._progress = progress
        self._weights = {(weight.role, weight.layer): weight for weight in weights_of_trunk(self.config)}
        self._total = checkpoint.check(self._weights.values())
        self._start = checkpoint.bytes_read

    def embed(self) -> torch.Tensor:
        """[V, D]"""
        return self._read("embed")

    def layer(self, index: int) -> LayerWeights:
        return LayerWeights(
            input_norm=self._read("input_norm", index),
            qkv=torch.cat([self._read("q", index), self._read("k", index), self._read("v", index)]),
            out=self._read("out", index),
            post_norm=self._read("post_norm", index),
            gate=self._read("router", index),
        )

    def norm(self) -> torch.Tensor:
        """[D]"""
        return self._read("norm")

    def head(self) -> torch.Tensor | None:
        """[V, D]; None: the embedding is the head."""
        return None if self.config.tie_word_embeddings else self._read("head")

    def _read(self, role: Role, layer: int | None = None) -> torch.Tensor:
        tensor = self._checkpoint.read(self._weights[role, layer], self.dtype, self.device)
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._start, self._total)
        return tensor
