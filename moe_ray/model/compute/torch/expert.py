"""An expert by torch: any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.core import AdapterRows

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to read or, where it is on a CPU, to fill; they keep its memory alive."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


class TorchFFN:
    """`expert.FFN` by torch."""

    def __init__(self, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, hidden_act: str) -> None:
        """w1 and w3 [I, D], w2 [D, I]."""
        # Gate and up share their input: one matrix, one pass over the rows.
        self._hold(torch.cat((w1, w3)), w2.contiguous(), hidden_act)

    @classmethod
    def joined(cls, w13: torch.Tensor, w2: torch.Tensor, hidden_act: str) -> TorchFFN:
        """Of w13 [2I, D], w1 above w3, and w2 [D, I], as they are held."""
        ffn = cls.__new__(cls)
        ffn._hold(w13, w2, hidden_act)
        return ffn

    def _hold(self, w13: torch.Tensor, w2: torch.Tensor, hidden_act: str) -> None:
        self._w13, self._w2, self._act = w13, w2, ACTIVATIONS[hidden_act]
        self.nbytes = w13.nbytes + w2.nbytes

    def buffers(self) -> list[memoryview]:
        """The bytes of w13 and w2, as `joined` takes them: of its own tensors on a CPU, of copies elsewhere."""
        return [bytes_of(self._w13), bytes_of(self._w2)]

    def entry(self) -> None:
        """None: torch computes through the interpreter."""
        return

    @torch.inference_mode()
    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        gate, up = F.linear(rows, self._w13).chunk(2, dim=-1)  # [T, I] each
        out = F.linear(self._act(gate) * up, self._w2)  # [T, D]
        return (out * weights.unsqueeze(-1)).to(rows.dtype)
