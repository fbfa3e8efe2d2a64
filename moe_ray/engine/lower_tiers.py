"""What lies below the KV cache, as the allocator and the scheduler see it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from typing import Any, Protocol

from moe_ray.core import Sequence


class LowerTiers(Protocol):
    """Keeps copies of KV blocks by their keys. Used by the engine's thread, between two forward passes."""

    def evicted(self, blocks: Seq[tuple[int, bytes]]) -> None:
        """Copy blocks, with their keys, that will be written to next. The one that is wanted last comes first."""
        ...

    def computed(self, blocks: Seq[tuple[int, bytes]]) -> None:
        """Blocks, with their keys, that the last pass has filled."""
        ...

    def fetch(self, seq: Sequence, keys: Seq[bytes], in_cache: Callable[[bytes], bool]) -> Future[Any] | None:
        """Begin to read from a disk what a new sequence may need of it; None where it need not wait.

        `keys`: of its leading blocks. `in_cache`: which of them the KV cache has.
        """
        ...

    def lend(self, seq: Sequence, keys: Seq[bytes], context: int) -> int:
        """How many leading blocks of `keys`, behind `context` tokens, `load` will load instead of their computation."""
        ...

    def load(self, seq: Sequence, keys: Seq[bytes], blocks: Seq[int]) -> None:
        """Fill blocks of the cache with what was lent by the last `lend`."""
        ...
