"""Which trunk a request goes to: the one with least to compute for it, as far as load is balanced. No ray, no grpc.

The idea is that of the cache-aware policy of SGLang's router (sgl-router) and of Ray Serve LLM's
`PrefixCacheAffinityRouter`: remember which prefixes went where, send a prompt where its beginning is known while the
load is balanced, and to the least loaded where it is not. What is remembered here are the keys of the engine's own
blocks (`engine/blocks.py`), evicted in the engine's order, so a known prefix is one that the trunk very likely has.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moe_ray.engine.blocks import block_key, root_key

REQUEST_TOKENS: Final = 32
"""One request in flight weighs as much as so many prompt tokens: it makes the others wait about as long."""
MOST_AHEAD: Final = 8
"""A trunk with so many more requests than the least loaded one..."""
TIMES_AHEAD: Final = 1.5
"""...and so many times as many is overloaded: it gets none, whatever it knows."""
FULL_KV: Final = 0.95
"""A trunk whose sequences hold this share of its KV blocks gets none while another has room."""
MOST_KEYS: Final = 131_072
"""Blocks remembered per trunk, however large its cache is: about 16 MB."""


def extend_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int, adapter_id: int = 0) -> None:
    """Append the keys of all full blocks of `token_ids` that follow those in `keys`; none for block size 0."""
    if not block_size:
        return
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = keys[-1] if keys else root_key(adapter_id)
        keys.append(block_key(parent, token_ids[start : start + block_size]))


class KnownPrefixes:
    """The blocks that a trunk has been given to compute, the least recently used forgotten first."""

    def __init__(self, capacity: int) -> None:
        """Remember at most `capacity` blocks."""
        self._capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of the first blocks are known, without a gap."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def add(self, keys: Sequence[bytes]) -> None:
        """Remember the blocks of one sequence; its last one is forgotten before its first, as the engine does."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)


@dataclass(slots=True, eq=False)
class TrunkView:
    """What one gateway knows of one trunk. A trunk that was started anew has a new one, which is empty."""

    block_size: int
    """Tokens; 0: its prefixes are not remembered."""
    known: KnownPrefixes
    live: int = 0
    """Requests of this gateway that have not ended there."""
    unanswered_tokens: int = 0
    """Prompt tokens that it was given to compute, of those requests that no token has come of."""
    others: int = 0
    """Requests of other gateways, when it last told."""
    kv_use: float = 0.0
    """The share of its KV blocks that sequences held, when it last told."""
    draining: bool = False
    """It will end: nothing new for it."""

    @staticmethod
    def of(block_size: int, kv_cache_tokens: int) -> TrunkView:
        """A trunk of which nothing is known but its size."""
        return TrunkView(block_size, KnownPrefixes(min(kv_cache_tokens // block_size, MOST_KEYS) if block_size else 0))

    def told(self, requests: int, kv_use: float, draining: bool) -> None:
        """Take in what the trunk says of itself: `requests` running or waiting, of all gateways."""
        self.others = max(0, requests - self.live)
        self.kv_use, self.draining = kv_use, draining

    def candidate(self, keys: Sequence[bytes], num_tokens: int) -> TrunkCandidate:
        """The trunk as a choice for a sequence of `num_tokens`, whose full blocks have these keys in its block size."""
        usable = (num_tokens - 1) // self.block_size if self.block_size else 0  # one token is always computed
        known = self.known.match(keys[:usable]) * self.block_size
        return TrunkCandidate(known, self.live + self.others, self.unanswered_tokens, self.kv_use)


@dataclass(frozen=True, slots=True)
class TrunkCandidate:
    """What speaks for and against a trunk, for one sequence."""

    known_tokens: int
    """Of the sequence: those that it need not compute."""
    requests: int = 0
    """In flight."""
    unanswered_tokens: int = 0
    """Prompt tokens that it computes first."""
    kv_use: float = 0.0

    @property
    def cost(self) -> int:
        """What must be computed besides the sequence's unknown tokens, in tokens, less those that are known."""
        return self.unanswered_tokens + REQUEST_TOKENS * self.requests - self.known_tokens


def choose(candidates: Sequence[TrunkCandidate], draw: random.Random) -> int:
    """Return the index of the trunk for a sequence (or several with the same prompt, which go together).

    Overloaded trunks are out (`MOST_AHEAD`, `TIMES_AHEAD`), then full ones (`FULL_KV`) unless all are. Of the others
    the cheapest: tokens known, against prompt tokens that wait there and `REQUEST_TOKENS` per request in flight. Where
    several are equal, two of them are drawn, and the one with more room in its cache is taken.
    """
    least = min(candidate.requests for candidate in candidates)
    balanced = [
        index
        for index, candidate in enumerate(candidates)
        if candidate.requests <= least + MOST_AHEAD or candidate.requests <= TIMES_AHEAD * least
    ]
    roomy = [index for index in balanced if candidates[index].kv_use < FULL_KV] or balanced
    cheapest = min(candidates[index].cost for index in roomy)
    equal = [index for index in roomy if candidates[index].cost == cheapest]
    drawn = draw.sample(equal, min(2, len(equal)))
    return min(drawn, key=lambda index: candidates[index].kv_use)
