"""Rows between a device and the host's memory: copies that run beside what this process does, and when they have ended.

All that is known of pinned memory and of when it may be used again is here. What copies is given (`Transfers`): on a
card its current stream, in tests what keeps the same contract on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

LEAST_BYTES: Final = 4096
"""Of a buffer; larger ones are powers of two, so that few sizes serve all."""
MOST_FREE_BYTES: Final = 256 << 20
"""Of buffers that wait to be used again; beyond it they are given back to the system."""
_ALIGNED: Final = 256
"""Bytes at whose multiples tensors begin that share a buffer."""


class Transfers(Protocol):
    """Copies of one device, in order with what this thread launches there.

    A copy that was begun has not happened until a mark made after it is waited for, or reached: a target in the host's
    memory is undefined until then, and a source there must not change.
    """

    def pinned(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] in memory of the host that copies run beside."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy `source` over `target`; returns at once. One of them may be in the host's memory."""
        ...

    def mark(self) -> Any:
        """The end of all that this thread has begun until now."""
        ...

    def wait(self, mark: Any) -> None:
        """Return once the mark is reached. Raises `RuntimeError` where the device is lost."""
        ...

    def reached(self, mark: Any) -> bool:
        """Whether the mark is reached, without waiting."""
        ...


class CudaTransfers:
    """`Transfers` of the current stream of a card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]


class Staging:
    """Buffers in pinned memory, and what is copied through them. Callable from several threads."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._lock = threading.Lock()
        self._free: dict[int, list[tuple[torch.Tensor, Any]]] = {}
        """By size: buffers, each with the mark that must be reached before it is used again; None: it is free."""
        self._free_bytes = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer, uint8 [nbytes or more], that no copy uses any more."""
        size = max(LEAST_BYTES, 1 << (nbytes - 1).bit_length())
        with self._lock:
            kept = self._free.get(size, [])
            for index, (buffer, mark) in enumerate(kept):
                if mark is None or self._transfers.reached(mark):
                    del kept[index]
                    self._free_bytes -= size
                    return buffer
        return self._transfers.pinned(size)

    def give(self, buffer: torch.Tensor, after: Any = None) -> None:
        """Let a buffer of `take` be used again once `after` is reached; None: now."""
        with self._lock:
            if self._free_bytes + len(buffer) <= MOST_FREE_BYTES:
                self._free.setdefault(len(buffer), []).append((buffer, after))
                self._free_bytes += len(buffer)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Copies of a device's tensors in the host's memory: all are begun at once, and waited for once.

        They lie in the buffer that is returned with them, and last until it is given back.
        """
        starts = [0]
        for each in tensors:
            starts.append(starts[-1] + aligned(each.nbytes))
        buffer = self.take(starts[-1])
        copies = [
            view_of(buffer, start, each.shape, each.dtype) for start, each in zip(starts[:-1], tensors, strict=True)
        ]
        for copy, each in zip(copies, tensors, strict=True):
            self._transfers.copy(copy, each)
        self._transfers.wait(self._transfers.mark())
        return buffer, copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy; the mark of its end, for `give`."""
        self._transfers.copy(target, source)
        return self._transfers.mark()

    def wait(self, mark: Any) -> None:
        """`Transfers.wait`."""
        self._transfers.wait(mark)

    def drain(self) -> None:
        """Return once the device has done all that this thread has begun until now."""
        self._transfers.wait(self._transfers.mark())


def aligned(nbytes: int) -> int:
    """`nbytes`, and what is left free behind them in a buffer that several tensors share."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


def view_of(buffer: torch.Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape in the bytes of a buffer from `start` on."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return buffer[start : start + size].view(dtype).view(shape)
