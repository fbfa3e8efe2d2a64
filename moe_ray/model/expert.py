"""One expert: a SwiGLU feed-forward network for each layer it holds. Stateless between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.core import ExpertKey
from moe_ray.model.checkpoint import Checkpoint, Progress, expert_specs

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ExpertFFN:
    """The weights of a set of (layer, expert) keys and their forward pass: w2(act(w1 x) * (w3 x)).

    Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); Mixtral: Jiang et al. 2024 (2401.04088).
    """

    def __init__(
        self,
        weights: dict[ExpertKey, tuple[torch.Tensor, torch.Tensor]],
        hidden_act: str,
    ) -> None:
        """`weights` maps (layer, expert) to w13 [2I, D] (w1 above w3) and w2 [D, I]."""
        self.weights = weights
        self._act = ACTIVATIONS[hidden_act]

    @staticmethod
    def load(
        checkpoint: Checkpoint,
        keys: Iterable[ExpertKey],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> ExpertFFN:
        """Read just the tensors of `keys`. Raises `CheckpointError`."""
        wanted = sorted(keys)
        specs = {key: expert_specs(checkpoint.config, *key) for key in wanted}
        total = checkpoint.check(spec for group in specs.values() for spec in group)
        start, weights = checkpoint.bytes_read, {}
        for key, (w1, w3, w2) in specs.items():
            # Gate and up share their input: one matrix, one pass over the rows.
            w13 = torch.empty((2 * w1.shape[0], w1.shape[1]), dtype=dtype, device=device)
            w13[: w1.shape[0]] = checkpoint.read(w1, dtype, device)
            w13[w1.shape[0] :] = checkpoint.read(w3, dtype, device)
            weights[key] = (w13, checkpoint.read(w2, dtype, device))
            if progress is not None:
                progress(checkpoint.bytes_read - start, total)
        return ExpertFFN(weights, checkpoint.config.hidden_act)

    @property
    def keys(self) -> frozenset[ExpertKey]:
        return frozenset(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of weights held in memory."""
        return sum(w.nbytes for pair in self.weights.values() for w in pair)

    @torch.inference_mode()
    def forward(self, key: ExpertKey, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        w13, w2 = self.weights[key]
        gate, up = F.linear(rows, w13).chunk(2, dim=-1)  # [T, I] each
        out = F.linear(self._act(gate) * up, w2)  # [T, D]
        return (out * weights.unsqueeze(-1)).to(rows.dtype)
