"""KV blocks in host memory: a pool of rows, the one that was not used for longest given up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch

from moe_ray.engine.kv_cache import zeroed_bytes


class HostTier:
    """At most `capacity` blocks by their keys. One thread."""

    def __init__(self, capacity: int, block_nbytes: int, pinned: bool) -> None:
        """`pinned`: have memory from which a card copies by itself."""
        self.capacity, self.block_nbytes = capacity, block_nbytes
        # Memory of a CPU's is taken when it is first written.
        pool = torch.zeros(capacity * block_nbytes, dtype=torch.uint8, pin_memory=True) if pinned else None
        self._pool = (zeroed_bytes(capacity * block_nbytes) if pool is None else pool).view(capacity, block_nbytes)
        self._row_of: OrderedDict[bytes, int] = OrderedDict()
        """Oldest first."""
        self._free = list(reversed(range(capacity)))
        self._lent: set[bytes] = set()
        self.evicted_blocks = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def place(self, key: bytes) -> torch.Tensor | None:
        """Where to copy a block that is not here, uint8 [block_nbytes]; None where all rows are lent."""
        assert key not in self._row_of
        if not self._free:
            oldest = next((each for each in self._row_of if each not in self._lent), None)
            if oldest is None:
                return None
            self._free.append(self._row_of.pop(oldest))
            self.evicted_blocks += 1
        row = self._row_of[key] = self._free.pop()
        return self._pool[row]

    def find(self, key: bytes) -> torch.Tensor | None:
        """A block's copy, uint8 [block_nbytes], which now is the one that was used last; None where it is not here."""
        row = self._row_of.get(key)
        if row is None:
            return None
        self._row_of.move_to_end(key)
        return self._pool[row]

    def lend(self, keys: Iterable[bytes]) -> None:
        """Keep the rows of these keys, which are here, and of no others as they are until the next `lend`."""
        self._lent = set(keys)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every row is free or of one key."""
        rows = [*self._free, *self._row_of.values()]
        assert sorted(rows) == list(range(self.capacity)), "a row is lost, or twice in use"
        assert all(key in self._row_of for key in self._lent), "a lent row is gone"
