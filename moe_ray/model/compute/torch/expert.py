"""An expert by torch: any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.core import AdapterRows
from moe_ray.errors import AdapterNotHeld
from moe_ray.model.compute.torch.low_rank import Thin
from moe_ray.model.lora.parts import ExpertPart

ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to read or, where it is on a CPU, to fill; they keep its memory alive."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class ThinExpert:
    """What one adapter adds to an expert."""

    w13: Thin | None
    w2: Thin | None


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
        self._adapters: dict[int, ThinExpert] = {}

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
        gate_up = F.linear(rows, self._w13)
        held = self._runs(adapters)
        for part, each in held:
            if each.w13 is not None:
                gate_up[part] += each.w13.apply(rows[part])
        gate, up = gate_up.chunk(2, dim=-1)  # [T, I] each
        inner = self._act(gate) * up
        out = F.linear(inner, self._w2)  # [T, D]
        for part, each in held:
            if each.w2 is not None:
                out[part] += each.w2.apply(inner[part])
        return (out * weights.unsqueeze(-1)).to(rows.dtype)

    @torch.inference_mode()
    def add_adapter(self, adapter_id: int, part: ExpertPart) -> None:
        if adapter_id in self._adapters:
            return  # of the same content, by its id; the memory that it is known by must stay
        inner, hidden = self._w2.shape[1], self._w2.shape[0]
        held = ThinExpert(
            Thin.above((part.gate, part.up), (inner, inner), self._w2), Thin.above((part.down,), (hidden,), self._w2)
        )
        self._adapters = {**self._adapters, adapter_id: held}

    def remove_adapter(self, adapter_id: int) -> None:
        self._adapters = {number: held for number, held in self._adapters.items() if number != adapter_id}

    def has_adapter(self, adapter_id: int) -> bool:
        return adapter_id in self._adapters

    @property
    def adapter_bytes(self) -> int:
        return sum(thin.nbytes for held in self._adapters.values() for thin in (held.w13, held.w2) if thin is not None)

    def adapter_handle(self, adapter_id: int) -> None:
        """None: torch goes by the id."""
        if adapter_id not in self._adapters:
            raise AdapterNotHeld(f"adapter {adapter_id} is not held by this expert")

    def _runs(self, adapters: tuple[AdapterRows, ...]) -> list[tuple[slice, ThinExpert]]:
        """The rows that have an adapter, and what it adds."""
        found, start, held = [], 0, self._adapters
        for run in adapters:
            if run.adapter_id and run.adapter_id not in held:
                raise AdapterNotHeld(f"adapter {run.adapter_id} is not held by this expert")
            if run.adapter_id:
                found.append((slice(start, start + run.count), held[run.adapter_id]))
            start += run.count
        return found
