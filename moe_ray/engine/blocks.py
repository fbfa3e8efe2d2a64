"""The block allocator of the paged KV cache, with prefix caching. Pure bookkeeping: no torch."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from moe_ray.engine.lower_tiers import LowerTiers

ROOT_KEY = b""


def root_key(adapter_id: int) -> bytes:
    """The parent's key of a first block: what different adapters make of one prefix is different."""
    return adapter_id.to_bytes(8, "little") if adapter_id else ROOT_KEY


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: 16 bytes of BLAKE2b over its parent's key and its tokens; equal keys mean equal prefixes."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockAllocator:
    """Hands out fixed-size KV blocks, counts references, and keeps freed full blocks for reuse, oldest evicted first.

    A block is in exactly one state: free (never keyed), evictable (keyed, no references) or held (references > 0).
    """

    def __init__(self, num_blocks: int, block_size: int, tiers: LowerTiers | None = None) -> None:
        """`tiers`: are told of blocks that are given up, before anything is written to them."""
        self._tiers = tiers
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._evictable)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or None (and nothing taken) if there are fewer."""
        if count > self.num_free:
            return None
        blocks: list[int] = []
        evicted: list[tuple[int, bytes]] = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._evictable.popitem(last=False)
                key = self._key[block]
                assert key is not None
                del self._block_of[key]
                self._key[block] = None
                evicted.append((block, key))
            self._refs[block] = 1
            blocks.append(block)
        if evicted and self._tiers is not None:
            self._tiers.evicted(evicted)
        return blocks

    def holds(self, key: bytes) -> bool:
        """Whether `lookup` would find it now."""
        return key in self._block_of

    def keyed(self) -> list[tuple[int, bytes]]:
        """Findable blocks with their keys: those that are held, then the others, the one that is evicted last first."""
        held = [block for block, refs in enumerate(self._refs) if refs]
        keys = ((block, self._key[block]) for block in (*held, *reversed(self._evictable)))
        return [(block, key) for block, key in keys if key is not None]

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest known prefix of `keys`, taking a reference on each."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._evictable[block]
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, key: bytes) -> None:
        """Make a held, full and computed block findable by `key`, unless another block has that key already."""
        assert self._refs[block] > 0
        if self._key[block] is None and key not in self._block_of:
            self._key[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each block; the last of a sequence is evicted before the first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is in exactly one state and `tables` hold all references."""
        refs = [0] * self.num_blocks
        for table in tables:
            for block in table:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from the block tables"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & evictable, "a block is both free and evictable"
        assert all((self._refs[b] == 0) == (b in free or b in evictable) for b in range(self.num_blocks))
        assert all((self._key[b] is None) if b in free else True for b in range(self.num_blocks))
        assert all(self._key[b] is not None for b in evictable)
        assert self._block_of == {key: b for b, key in enumerate(self._key) if key is not None}
