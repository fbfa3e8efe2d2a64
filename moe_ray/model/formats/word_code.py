"""Codes ternary digits, most of them 0, in words of 16 bits, as Tunstall's thesis of 1967 does.

A word stands for a run of digits of a dictionary, the longer the likelier its digits are. No run begins with another
one, so that digits are cut into words in one way. The dictionary is not stored: one number makes it, of how many zeros
are as likely as one other digit. So a corrupt word decodes to other digits, and never to more than the longest run.
"""

from __future__ import annotations

import heapq
import math
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

WORDS: Final = 1 << 16
WORTHS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""The dictionaries that there are: zeros as likely as one digit that is not 0."""
CHUNK: Final = 1 << 14
"""Words that are decoded at a time, so that what comes between stays in a cache."""


class BadWords(ValueError):
    """Words that no digits of this count are coded in."""


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """The words of one worth, W <= 65536 of them, of at most S digits that are not 0."""

    worth: int
    lengths: np.ndarray = field(repr=False)
    """uint16 [W]: digits of a word."""
    counts: np.ndarray = field(repr=False)
    """uint16 [W]: how many of them are not 0."""
    places: np.ndarray = field(repr=False)
    """uint16 [S, W]: where in a word its digits that are not 0 lie; where it has fewer, its last one again (or 0)."""
    digits: np.ndarray = field(repr=False)
    """uint8 [S, W]: which digits lie there."""
    children: array[int] = field(repr=False)
    """Of the tree whose leaves are words: [node + digit] is a node, or the complement of a word."""

    def encode(self, digits: np.ndarray) -> np.ndarray:
        """The words, uint16, of digits 0, 1, 2 (uint8, of any shape, in their order). The last may say zeros more."""
        import numpy as np

        children, words, node = self.children, array("H"), 0
        for digit in digits.tobytes():
            node = children[node + digit]
            if node < 0:
                words.append(~node)
                node = 0
        while node > 0:  # zeros, to the end of a word
            node = children[node]
        if node < 0:
            words.append(~node)
        return np.frombuffer(words, np.uint16).copy()

    def decode(self, words: np.ndarray, count: int) -> np.ndarray:
        """The `count` digits, uint8, of words. Raises `BadWords` where the words are not of so many."""
        import numpy as np

        size = len(self.lengths)
        if words.size and int(words.max()) >= size:
            raise BadWords(f"word {int(words.max())}, there are {size}")
        lengths = np.take(self.lengths, words)
        whole = int(lengths.sum(dtype=np.int64))
        last = int(lengths[-1]) if words.size else 0
        if not whole - last < count <= whole:
            raise BadWords(f"words of {whole} digits, for {count}")
        found = np.zeros(whole, np.uint8)
        start = 0
        for first in range(0, len(words), CHUNK):
            part = words[first : first + CHUNK].astype(np.intp)
            ends = np.cumsum(lengths[first : first + CHUNK], dtype=np.intp) + start
            starts = np.concatenate(([start], ends[:-1]))
            start = int(ends[-1])
            for places, digits in zip(self.places, self.digits, strict=True):
                found[starts + places.take(part)] = digits.take(part)
        if found[count:].any():
            raise BadWords("digits that are not 0 behind the last one")
        return found[:count]


def worth_of(share: float) -> int:
    """Which of `WORTHS` fits digits of which `share` is not 0: the nearest in bits of a digit to bits of a 0."""
    if not 0 < share < 1:
        return WORTHS[0] if share else WORTHS[-1]
    bits = math.log2(math.log2(share / 2) / math.log2(1 - share))
    return WORTHS[min(max(round(bits), 0), len(WORTHS) - 1)]


def bits_of(share: float) -> float:
    """Bits of a digit in words, where `share` of the digits is not 0, one sign as likely as the other, at any place."""
    import numpy as np

    words = dictionary(worth_of(share))
    others = words.counts.astype(np.float64)
    likely = (1 - share) ** (words.lengths - others) * (share / 2) ** others
    return 16 / float((likely * words.lengths).sum())


@lru_cache(maxsize=len(WORTHS))
def dictionary(worth: int) -> Dictionary:
    """The dictionary of one of `WORTHS`: the likeliest run is made longer, by each of the digits, while words last.

    A run is the less likely the more its digits cost together: a 0 costs 1, another digit `worth`. Of equal ones, the
    one that was made first. Only integers are compared, so that it is the same everywhere.
    """
    import numpy as np

    runs: list[tuple[int, tuple[tuple[int, int], ...]]] = [(0, ())]  # length, and (place, digit) of what is not 0
    heap = [(0, 0)]  # cost, number of the run
    inner: dict[int, int] = {}  # number of a run that was made longer → that of its first child
    while len(heap) + 2 <= WORDS:
        cost, run = heapq.heappop(heap)
        length, others = runs[run]
        inner[run] = len(runs)
        for digit in range(3):
            heapq.heappush(heap, (cost + (worth if digit else 1), len(runs)))
            runs.append((length + 1, (*others, (length, digit)) if digit else others))
    leaves = sorted(run for _, run in heap)
    word_of = {run: word for word, run in enumerate(leaves)}
    node_of = {run: 3 * node for node, run in enumerate(inner)}
    children = array("i")
    for first in inner.values():
        children.extend(node_of[run] if run in inner else ~word_of[run] for run in range(first, first + 3))
    slots = max(len(runs[run][1]) for run in leaves)
    places, digits = np.zeros((slots, len(leaves)), np.uint16), np.zeros((slots, len(leaves)), np.uint8)
    for word, run in enumerate(leaves):
        others = runs[run][1]
        for slot in range(slots if others else 0):
            places[slot, word], digits[slot, word] = others[min(slot, len(others) - 1)]
    lengths = np.array([runs[run][0] for run in leaves], np.uint16)
    counts = np.array([len(runs[run][1]) for run in leaves], np.uint16)
    return Dictionary(worth, lengths, counts, places, digits, children)
