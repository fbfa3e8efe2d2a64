"""An expert by torch: any device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.core import AdapterRows
from moe_ray.model.compute.torch.low_rank import Thin
from moe_ray.model.families import ClampedSwiGLU
from moe_ray.model.lora.network_adapters import NetworkAdapters
from moe_ray.model.lora.parts import ExpertPart

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated(gate: torch.Tensor, up: torch.Tensor, hidden_act: str, clamped: ClampedSwiGLU | None) -> torch.Tensor:
    """What an expert makes of its gate and up [T, I]: act(gate) * up, or what `ClampedSwiGLU` says."""
    if clamped is None:
        return ACTIVATIONS[hidden_act](gate) * up
    gate, up = gate.clamp(max=clamped.limit), up.clamp(-clamped.limit, clamped.limit)
    return gate * torch.sigmoid(gate * clamped.alpha) * (up + 1)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to read or, where it is on a CPU, to fill; they keep its memory alive."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class ThinExpert:
    """What one adapter adds to an expert."""

    w13: Thin | None
    w2: Thin | None


class TorchFFN(NetworkAdapters[ThinExpert]):
    """`expert.FFN` by torch."""

    def __init__(
        self,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        hidden_act: str,
        biases: Sequence[torch.Tensor] = (),
        clamped: ClampedSwiGLU | None = None,
    ) -> None:
        """w1 and w3 [I, D], w2 [D, I]; `biases`: theirs, [I], [I] and [D], or none. `clamped`: see `gated`."""
        # Gate and up share their input: one matrix, one pass over the rows.
        joined = (torch.cat(tuple(biases[:2])), biases[2].contiguous()) if biases else ()
        self._hold(torch.cat((w1, w3)), w2.contiguous(), hidden_act, joined, clamped)

    @classmethod
    def joined(
        cls,
        w13: torch.Tensor,
        w2: torch.Tensor,
        hidden_act: str,
        biases: Sequence[torch.Tensor] = (),
        clamped: ClampedSwiGLU | None = None,
    ) -> TorchFFN:
        """Of w13 [2I, D], w1 above w3, and w2 [D, I], as they are held, and their biases [2I] and [D], or none."""
        ffn = cls.__new__(cls)
        ffn._hold(w13, w2, hidden_act, biases, clamped)
        return ffn

    def _hold(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        hidden_act: str,
        biases: Sequence[torch.Tensor],
        clamped: ClampedSwiGLU | None,
    ) -> None:
        self._w13, self._w2, self._act, self._clamped = w13, w2, hidden_act, clamped
        self._biases = tuple(biases)
        self.nbytes = sum(each.nbytes for each in (w13, w2, *biases))
        NetworkAdapters.__init__(self)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `joined` takes, in its order."""
        return (self._w13, self._w2, *self._biases)

    def over(self, tensors: Sequence[torch.Tensor]) -> TorchFFN:
        """A network of this kind without adapters over other memory, of `tensors` in the order of `joined`."""
        w13, w2, *biases = tensors
        return TorchFFN.joined(w13, w2, self._act, biases, self._clamped)

    def buffers(self) -> list[memoryview]:
        """The bytes of what `joined` takes, in its order: of its own tensors on a CPU, of copies elsewhere."""
        return [bytes_of(each) for each in self.tensors()]

    def entry(self) -> None:
        """None: torch computes through the interpreter."""
        return

    @torch.inference_mode()
    def forward(
        self, rows: torch.Tensor, weights: torch.Tensor, adapters: tuple[AdapterRows, ...] = ()
    ) -> torch.Tensor:
        """Return the network's output for `rows` [T, D], each row times its routing weight ([T] float32)."""
        of_13, of_2 = self._biases or (None, None)
        gate_up = F.linear(rows, self._w13, of_13)
        held = self.runs_with_adapters(adapters)
        for part, each in held:
            if each.w13 is not None:
                gate_up[part] += each.w13.apply(rows[part])
        gate, up = gate_up.chunk(2, dim=-1)  # [T, I] each
        inner = gated(gate, up, self._act, self._clamped)
        out = F.linear(inner, self._w2, of_2)  # [T, D]
        for part, each in held:
            if each.w2 is not None:
                out[part] += each.w2.apply(inner[part])
        return (out * weights.unsqueeze(-1)).to(rows.dtype)

    @torch.inference_mode()
    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        inner, hidden, like = self._w2.shape[1], self._w2.shape[0], self._w2
        self.hold_adapter(
            adapter_id,
            lambda: ThinExpert(
                Thin.above((part.gate, part.up), (inner, inner), like), Thin.above((part.down,), (hidden,), like)
            ),
        )

    @property
    def adapter_bytes(self) -> int:
        return sum(thin.nbytes for held in self._adapters.values() for thin in (held.w13, held.w2) if thin is not None)

    def adapter_handle(self, adapter_id: int) -> None:
        """None: torch goes by the id."""
        self.held_adapter(adapter_id)
