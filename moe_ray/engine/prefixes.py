"""The leading blocks of sequences: their keys, and what of them need not be computed again. No torch."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from moe_ray.core import Sequence
from moe_ray.engine.blocks import BlockAllocator, block_key, root_key
from moe_ray.engine.lower_tiers import LowerTiers
from moe_ray.engine.prompt_positions import wants_logits


class Prefixes:
    """Finds them in the KV cache and below it, and makes computed ones findable. One thread."""

    def __init__(self, allocator: BlockAllocator, enabled: bool, tiers: LowerTiers | None = None) -> None:
        """`enabled` False: nothing is found. `tiers`: below the cache; None: nothing is."""
        self._allocator, self._enabled = allocator, enabled
        self._tiers = tiers if enabled else None
        self.query_tokens = self.hit_tokens = 0

    def keys(self, seq: Sequence) -> list[bytes]:
        """Keys of the leading blocks that need not be computed, if they are found.

        At least one token is computed, because its logits are wanted; and where the experts or the logits of every
        position are, none is skipped of which they are not known yet.
        """
        if not self._enabled:
            return []
        most = len(seq.token_ids) - 1
        if seq.request.sampling.return_routed_experts:
            most = min(most, seq.num_routed)
        if wants_logits(seq):
            most = min(most, seq.num_scored)
        blocks = most // self._allocator.block_size
        self._extend_keys(seq, blocks)
        return seq.block_keys[:blocks]

    def fetch(self, seq: Sequence) -> Future[Any] | None:
        """Begin to read from a disk what a new sequence may need of it; None where it need not wait."""
        return None if self._tiers is None else self._tiers.fetch(seq, self.keys(seq), self._allocator.holds)

    def take(self, seq: Sequence, missing: int) -> tuple[list[int], int] | None:
        """Take blocks for a sequence's prefix: those that the cache has, and how many more `load` will fill.

        None, and nothing taken, where the cache has no room for the whole sequence beside them. `missing`: blocks that
        the whole sequence takes.
        """
        keys = self.keys(seq)
        cached = self._allocator.lookup(keys)
        if missing - len(cached) > self._allocator.num_free:
            self._allocator.release(cached)
            return None
        if self._tiers is None:
            return cached, 0
        context = len(cached) * self._allocator.block_size
        return cached, self._tiers.lend(seq, keys[len(cached) :], context)

    def load(self, seq: Sequence, first: int, count: int) -> None:
        """Fill `count` blocks of a sequence's table from index `first` on with what `take` promised."""
        if self._tiers is None:
            return
        keys, blocks = seq.block_keys[first : first + count], seq.block_table[first : first + count]
        self._tiers.load(seq, keys, blocks)
        for block, key in zip(blocks, keys, strict=True):
            self._allocator.register(block, key)

    def count(self, seq: Sequence, found: int) -> None:
        """Note that a sequence was admitted, and so many of its tokens were found."""
        if self._enabled:
            self.query_tokens += len(seq.token_ids)
        self.hit_tokens += found

    def register(self, seq: Sequence, old: int, new: int) -> None:
        """Make blocks [old, new) of a sequence findable: they are full and computed."""
        if new > old and self._enabled and not seq.degraded:
            self._extend_keys(seq, new)
            blocks = list(zip(seq.block_table[old:new], seq.block_keys[old:new], strict=True))
            for block, key in blocks:
                self._allocator.register(block, key)
            if self._tiers is not None:
                self._tiers.computed(blocks)

    def _extend_keys(self, seq: Sequence, blocks: int) -> None:
        size = self._allocator.block_size
        for i in range(len(seq.block_keys), blocks):
            parent = seq.block_keys[-1] if seq.block_keys else root_key(seq.request.adapter_id)
            seq.block_keys.append(block_key(parent, seq.token_ids[i * size : (i + 1) * size]))
