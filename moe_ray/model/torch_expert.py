"""An expert by torch: any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class TorchFFN:
    """`expert.FFN` by torch."""

    def __init__(self, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, hidden_act: str) -> None:
        """w1 and w3 [I, D], w2 [D, I]."""
        self._w13 = torch.cat((w1, w3))  # gate and up share their input: one matrix, one pass over the rows
        self._w2 = w2
        self._act = ACTIVATIONS[hidden_act]
        self.nbytes = self._w13.nbytes + w2.nbytes

    @torch.inference_mode()
    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        gate, up = F.linear(rows, self._w13).chunk(2, dim=-1)  # [T, I] each
        out = F.linear(self._act(gate) * up, self._w2)  # [T, D]
        return (out * weights.unsqueeze(-1)).to(rows.dtype)
