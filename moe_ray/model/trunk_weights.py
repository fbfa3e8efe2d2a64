"""The trunk's weights, read from a checkpoint when they are asked for: a backend that repacks them holds them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.config_parts import LatentAttention
from moe_ray.model.families import TrunkRole
from moe_ray.model.matrix import Matrix, tensor_of
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_trunk

QKV_BIASES: Final[tuple[TrunkRole, ...]] = ("q_bias", "k_bias", "v_bias")
VECTORS: Final[tuple[TrunkRole, ...]] = (
    *("input_norm_bias", *QKV_BIASES, "q_norm", "k_norm", "sinks", "out_bias", "post_norm_bias", "router_bias"),
    *("shared_share", "router_correction"),
)
"""What only some families have of a layer, beside matrices."""
SHARED: Final[tuple[TrunkRole, ...]] = ("shared_gate", "shared_up", "shared_down")
DENSE: Final[tuple[TrunkRole, ...]] = ("dense_gate", "dense_up", "dense_down")


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Of latent attention, in place of q, k and v. H heads; sizes as `LatentAttention` names them."""

    down: Sequence[Matrix]  # [q_rank, D] or, where queries have no latents, [H * query, D]; [width, D]; to lie together
    q_norm: torch.Tensor | None  # [q_rank]
    q_up: Matrix | None  # [H * query, q_rank]
    kv_norm: torch.Tensor  # [kv_rank]
    keys: torch.Tensor  # [H, kv_rank, nope] brings a head's query to the latents' space
    values: torch.Tensor  # [H, value, kv_rank] brings a head's output out of it


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its experts: norms and gate, and the matrices that may be quantised, not yet read."""

    input_norm: torch.Tensor  # [D]
    qkv: Sequence[Matrix]  # [heads * head_dim, D] and twice [kv_heads * head_dim, D], to lie one above the other
    out: Matrix  # [D, heads * head_dim]; of latent attention [D, heads * value]
    post_norm: torch.Tensor  # [D]
    gate: torch.Tensor
    """[E, D]; zeros where there is no router, and one expert gets all; without rows where the layer has no experts."""
    vectors: Mapping[TrunkRole, torch.Tensor] = field(default_factory=dict)
    """Those of `VECTORS` that the model has."""
    shared: Sequence[Matrix] = ()
    """Gate and up [I, D], down [D, I], of the shared expert or, in a layer without experts, of what is in their stead;
    (): there is none."""
    latent: LatentWeights | None = None
    """None: `qkv` are there."""


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
            qkv=[self._matrix(role, index) for role in ("q", "k", "v")] if self.config.latent is None else [],
            out=self._matrix("out", index),
            post_norm=self._read("post_norm", index),
            gate=self._gate(index),
            vectors={role: self._read(role, index) for role in VECTORS if (role, index) in self._weights},
            shared=[self._matrix(role, index) for role in (*SHARED, *DENSE) if (role, index) in self._weights],
            latent=None if self.config.latent is None else self._latent(self.config.latent, index),
        )

    def _latent(self, latent: LatentAttention, index: int) -> LatentWeights:
        by_head = self._read("kv_b", index).view(-1, latent.nope + latent.value, latent.kv_rank)
        keys, values = by_head[:, : latent.nope], by_head[:, latent.nope :]
        has_latents = latent.q_rank is not None
        return LatentWeights(
            [self._matrix("q_a" if has_latents else "q", index), self._matrix("kv_a", index)],
            self._read("q_a_norm", index) if has_latents else None,
            self._matrix("q_b", index) if has_latents else None,
            self._read("kv_a_norm", index),
            keys.transpose(1, 2).contiguous(),
            values.contiguous(),
        )

    def norm(self) -> torch.Tensor:
        """[D]"""
        return self._read("norm")

    def optional(self, role: TrunkRole) -> torch.Tensor | None:
        """What only some families have of no layer: norm_bias [D], head_bias [V]; None where it is not there."""
        return self._read(role) if (role, None) in self._weights else None

    def head(self) -> Matrix | None:
        """[V, D]; None: the embedding is the head."""
        return None if self.config.tie_word_embeddings else self._matrix("head")

    def tensor(self, *rows: Matrix) -> torch.Tensor:
        """Matrices as one tensor, one above the other."""
        return torch.cat([tensor_of(matrix.values()).to(device=self.device, dtype=self.dtype) for matrix in rows])

    def _gate(self, index: int) -> torch.Tensor:
        dense = index in self.config.dense_layers
        if self.config.routed and not dense:
            return self._read("router", index)
        return torch.zeros((0 if dense else 1, self.config.hidden_size), dtype=self.dtype, device=self.device)

    def _matrix(self, role: TrunkRole, layer: int | None = None) -> Matrix:
        return self._checkpoint.matrix(self._weights[role, layer], self._report)

    def _read(self, role: TrunkRole, layer: int | None = None) -> torch.Tensor:
        wide = role == "router_correction" or (role == "router" and self.config.router.wide)
        dtype = torch.float32 if wide else self.dtype
        tensor = self._checkpoint.read(self._weights[role, layer], dtype, self.device)
        self._report()
        return tensor

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - self._start, self._total)
