"""Copies of a device as slow as they may be, on a CPU: none has happened before it is waited for."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from moe_ray.model.compute.torch.staging import Staging


@dataclass
class Begun:
    """A copy that has not ended."""

    host: torch.Tensor
    """Its end in the host's memory."""
    values: torch.Tensor
    """What the device's stream copies."""
    arrives: bool
    """Whether it comes to the host."""


class DelayedTransfers:
    """`Transfers` whose marks are reached only by waiting, and whose misuse shows.

    What comes to the host is not a number until it has arrived. What leaves the host must be the same at the copy's
    end as at its beginning: else some of it would have been copied too late.
    """

    def __init__(self) -> None:
        self._begun: list[Begun] = []
        self._ended = 0
        self._pinned: list[torch.Tensor] = []
        self._lock = threading.RLock()
        self.waits = self.copies = 0

    def staging(self) -> Staging:
        return Staging(self)

    @property
    def buffers(self) -> int:
        """How many there are."""
        return len(self._pinned)

    def pinned(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            self._pinned.append(torch.full((nbytes,), 0xFF, dtype=torch.uint8))
            return self._pinned[-1]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._lock:
            self.copies += 1
            if self._is_pinned(target):
                self._begun.append(Begun(target, source.clone(), arrives=True))
                _bytes_of(target).fill_(0xFF)
            else:
                target.copy_(source)
                if self._is_pinned(source):
                    self._begun.append(Begun(source, source.clone(), arrives=False))

    def mark(self) -> int:
        return self._ended + len(self._begun)

    def wait(self, mark: int) -> None:
        with self._lock:
            self.waits += 1
            while self._ended < mark:
                copy = self._begun.pop(0)
                self._ended += 1
                if copy.arrives:
                    copy.host.copy_(copy.values)
                elif not torch.equal(_bytes_of(copy.host), _bytes_of(copy.values)):
                    raise AssertionError("a buffer was written to before the copy that reads it had ended")

    def reached(self, mark: int) -> bool:
        return mark <= self._ended

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        at = tensor.untyped_storage().data_ptr()
        return any(at == buffer.untyped_storage().data_ptr() for buffer in self._pinned)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
