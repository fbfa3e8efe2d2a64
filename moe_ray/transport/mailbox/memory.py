"""Memory of a device that two processes share, and flags that its stream writes and waits for: the seam to the card."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import torch

_WORD: Final = struct.Struct("<I")
_STRIDE: Final = 64
"""Bytes between two words: each has a cache line of its own."""
_CLOSED: Final = 0
"""The word by which the process that opened the memory says that it uses it no more."""
PAGE_BYTES: Final = 4096
MOST_SLOTS: Final = PAGE_BYTES // _STRIDE - 1


class FlagPage:
    """A page of words in memory that two processes share and their devices see. A word is written whole."""

    def __init__(self, fd: int) -> None:
        """Map the page of a file descriptor, which may be closed from then on. Raises `OSError`."""
        self.words = mmap.mmap(fd, PAGE_BYTES)

    @staticmethod
    def create() -> tuple[FlagPage, int]:
        """A page of zeros, and the descriptor to send to the other process and to close."""
        fd = os.memfd_create("moe-ray-flags", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE_BYTES)
        return FlagPage(fd), fd

    @staticmethod
    def offset(slot: int) -> int:
        """Where a slot's word is in the page, in bytes."""
        return _STRIDE * (1 + slot)

    def reached(self, slot: int, generation: int) -> bool:
        """Whether a slot's word is at `generation` or later, in the cyclic order of 32 bits."""
        (word,) = _WORD.unpack_from(self.words, self.offset(slot))
        return ((word - generation) & 0xFFFF_FFFF) < 1 << 31

    def store(self, slot: int, generation: int) -> None:
        """Write a slot's word from the host: what waits for it goes on."""
        _WORD.pack_into(self.words, self.offset(slot), generation)

    @property
    def is_closed(self) -> bool:
        """Whether the other process uses the memory no more."""
        return bool(_WORD.unpack_from(self.words, _CLOSED)[0])

    def say_closed(self) -> None:
        """Say so, as that process."""
        _WORD.pack_into(self.words, _CLOSED, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A piece of a device's memory."""

    memory: torch.Tensor  # uint8 [N]
    handle: bytes
    """By which another process opens it."""
    close: Callable[[], None]
    """Free it, or, of one that was opened, let it go. Not while the device uses it. Idempotent."""


class DeviceMemory(Protocol):
    """One device as a process uses it. What is begun on it runs in the order in which this thread begins it."""

    @property
    def card(self) -> str:
        """Which physical card this is, by a name that is the same in every process."""
        ...

    def allocate(self, nbytes: int) -> Region:
        """Memory that other processes may open. Raises `MailboxRefused`."""
        ...

    def open(self, handle: bytes, nbytes: int) -> Region:
        """Memory that another process allocated on the same card. Raises `MailboxRefused`."""
        ...

    def register(self, page: FlagPage) -> None:
        """Let the device see a page. Raises `MailboxRefused`."""
        ...

    def forget(self, page: FlagPage) -> None:
        """The device sees it no more. Not while it writes there or waits. Idempotent."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy."""
        ...

    def write_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        """Begin to write a slot's word, once all that was begun before is done, and seen by other processes."""
        ...

    def wait_flag(self, page: FlagPage, slot: int, generation: int) -> None:
        """Have the device go on only when the slot's word has reached `generation`. Returns at once.

        It waits as long as it takes: whoever begins this sees to its end (`Watchdog`).
        """
        ...

    def join(self) -> None:
        """Have what this thread computes from now on come after what it has begun here."""
        ...

    def mark(self) -> Any:
        """The end of all that this thread has begun and computed until now."""
        ...

    def wait(self, mark: Any) -> None:
        """Return once a mark is reached."""
        ...
