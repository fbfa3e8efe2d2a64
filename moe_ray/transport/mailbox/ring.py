"""The slots of a link's mailbox: where each lies, which call has which, and in which generation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.errors import ProtocolError
from moe_ray.transport.mailbox.memory import MOST_SLOTS

if TYPE_CHECKING:
    import torch

SLOTS: Final = 4
"""Of a link: calls of micro-batches and hedges. Further calls in flight take the socket."""
SLOT_ROWS: Final = 128
"""Rows of a call that fits a slot. More take the socket: there copying is not what they wait for."""
_ALIGNED: Final = 256
_MOST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where slots lie in a region: those for calls, then those for replies."""

    slots: int
    slot_bytes: int

    @staticmethod
    def of(hidden_size: int, item_bytes: int) -> SlotLayout:
        """Slots for `SLOT_ROWS` rows of this width, with their weights."""
        return SlotLayout(SLOTS, _aligned(SLOT_ROWS * hidden_size * item_bytes) + _aligned(4 * SLOT_ROWS))

    def check(self) -> None:
        """Raise `ProtocolError` unless a peer may ask for this."""
        if not 1 <= self.slots <= MOST_SLOTS or not 1 <= self.slot_bytes <= _MOST_BYTES:
            raise ProtocolError(f"a mailbox of {self.slots} slots of {self.slot_bytes} bytes")

    @property
    def nbytes(self) -> int:
        return 2 * self.slots * self.slot_bytes

    def fits_call(self, row_bytes: int, count: int) -> bool:
        """Whether as many rows, `row_bytes` in all, fit a slot with their weights."""
        return _aligned(row_bytes) + 4 * count <= self.slot_bytes

    def call_slot(
        self, memory: torch.Tensor, slot: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T, D] and weights float32 [T] of a call in a slot."""
        import torch

        start, size = slot * self.slot_bytes, shape[0] * shape[1] * dtype.itemsize
        rows = memory[start : start + size].view(dtype).view(shape)
        start += _aligned(size)
        return rows, memory[start : start + 4 * shape[0]].view(torch.float32)

    def reply_slot(self, memory: torch.Tensor, slot: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, D] of the reply to the call in a slot."""
        start = (self.slots + slot) * self.slot_bytes
        return memory[start : start + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """A slot as one call has it."""

    slot: int
    generation: int


class Ring:
    """Which call has which slot, on the trunk's side. A slot is a call's until its reply has come, whatever it says.

    So the replica never reads what a later call has put there, and never writes over a reply that is not read.
    """

    def __init__(self, slots: int) -> None:
        self._free = deque(range(slots))
        self._generations = [0] * slots
        self._taken: dict[int, SlotPlace] = {}

    def take(self, call_id: int) -> SlotPlace | None:
        """A slot for a call, in a generation of its own; None: all are taken."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._generations[slot] = (self._generations[slot] + 1) & 0xFFFF_FFFF
        place = self._taken[call_id] = SlotPlace(slot, self._generations[slot])
        return place

    def give(self, call_id: int) -> SlotPlace | None:
        """The slot that a call had, free from now on; None: it had none."""
        place = self._taken.pop(call_id, None)
        if place is not None:
            self._free.append(place.slot)
        return place


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
