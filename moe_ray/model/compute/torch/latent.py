"""Multi-head latent attention by torch: what is cached of a token is its latent and one rotated key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_ray.model.config_parts import LATENT_EPS, LatentAttention
from moe_ray.model.layers import apply_rope, rms_norm
from moe_ray.model.trunk_weights import LatentWeights, TrunkWeights


@dataclass(frozen=True, slots=True)
class LatentTensors:
    """One layer's, from hidden states to queries and keys, and from what is attended to the outputs of heads."""

    shape: LatentAttention
    down: torch.Tensor  # [q_rank or H * query, then width; D]
    q_norm: torch.Tensor | None  # [q_rank]
    q_up: torch.Tensor | None  # [H * query, q_rank]
    kv_norm: torch.Tensor  # [kv_rank]
    keys: torch.Tensor  # [H, kv_rank, nope]
    values: torch.Tensor  # [H, value, kv_rank]

    @staticmethod
    def read(shape: LatentAttention, weights: TrunkWeights, w: LatentWeights) -> LatentTensors:
        """Raises `CheckpointError`."""
        up = None if w.q_up is None else weights.tensor(w.q_up)
        return LatentTensors(shape, weights.tensor(*w.down), w.q_norm, up, w.kv_norm, w.keys, w.values)

    @property
    def nbytes(self) -> int:
        held = (self.down, self.q_norm, self.q_up, self.kv_norm, self.keys, self.values)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def project(self, normed: torch.Tensor, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [P, H, width] and keys [P, 1, width], rotated, of normed hidden states [P, D]."""
        s = self.shape
        down = F.linear(normed, self.down)
        q, kv = down[:, : -s.width], down[:, -s.width :]
        if self.q_norm is not None and self.q_up is not None:
            q = F.linear(rms_norm(q, self.q_norm, LATENT_EPS), self.q_up)
        q, kv = q.view(len(q), -1, s.query), kv[:, None]
        queries = torch.einsum("phn,hrn->phr", q[..., : s.nope], self.keys)
        latent = rms_norm(kv[..., : s.kv_rank], self.kv_norm, LATENT_EPS)
        return (
            torch.cat((queries, apply_rope(q[..., s.nope :], cos_sin)), -1),
            torch.cat((latent, apply_rope(kv[..., s.kv_rank :], cos_sin)), -1),
        )

    def outputs(self, attended: torch.Tensor) -> torch.Tensor:
        """Outputs of all heads [P, H * value] of what they attended to [P, H, width]: sums of cached rows."""
        return torch.einsum("phr,hvr->phv", attended[..., : self.shape.kv_rank], self.values).flatten(1)
