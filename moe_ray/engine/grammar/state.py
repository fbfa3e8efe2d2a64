"""What may follow the tokens of a sequence whose text must match a grammar: state and masks. On the engine's thread.

The state is a pure function of (grammar, output tokens): after a replay elsewhere it is made again from the output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from moe_ray.core import Batch, Sequence
from moe_ray.engine.adjustments import GrammarMasks
from moe_ray.errors import InvalidRequest, MoeRayError

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

MOST_TOKEN_S: Final = 0.5
"""A token whose mask takes more of the engine's thread ends its request: the others of the batch wait for it."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CompiledSource:
    """A compiled grammar, over a vocabulary that has one token more than the model: its only end token.

    So the grammar's own end has a bit in each mask, whatever tokens end the sequences of a request.
    """

    grammar: CompiledGrammar
    vocab_size: int
    """Of the model."""
    nbytes: int


class GrammarState:
    """Where one sequence is in its grammar: its `Constraint`."""

    def __init__(self, compiled: CompiledSource, end_token_ids: Seq[int], output_token_ids: Seq[int]) -> None:
        """After `output_token_ids`. Raises `InvalidRequest` where the grammar does not allow them, or nothing more."""
        from xgrammar import GrammarMatcher

        self.failure: MoeRayError | None = None
        """Why no more tokens can be generated, once that is so."""
        self.ended = False
        """The output matches the grammar, and no longer text does."""
        self._compiled = compiled
        self._matcher = GrammarMatcher(compiled.grammar)
        self._ends = np.zeros((1, _words(compiled.vocab_size)), np.uint32)
        for token_id in end_token_ids:
            self._ends[0, token_id // 32] |= np.uint32(1 << token_id % 32)
        for position, token_id in enumerate(output_token_ids):
            if self.ended or not self.accept(token_id):
                raise _not_allowed("output_token_ids", f"token {token_id} at position {position}")
        if self.failure is not None:
            raise self.failure
        if self.ended or self._at_end():
            raise _not_allowed("grammar", "any token here: it is complete")

    @property
    def complete(self) -> bool:
        """The output matches; more may follow."""
        return bool(self._matcher.is_completed())

    def accept(self, token_id: int) -> bool:
        """Append a token that ends nothing; False, and a `failure`, where the grammar does not allow it."""
        with self._timed():
            accepted = self._matcher.accept_token(token_id)
            self.ended = accepted and self._at_end()
        if not accepted:
            self.failure = self.failure or _not_allowed("grammar", f"token {token_id}")
        return accepted

    def ends_with(self, token_id: int) -> bool:
        """Append a token that ends nothing; whether the output is complete with it, and nothing may follow."""
        self.accept(token_id)
        return self.ended

    def num_possible(self, draft: Seq[int]) -> int:
        """How many leading drafts are possible and can have a successor."""
        count = 0
        with self._timed():
            while count < len(draft) and self._matcher.accept_token(draft[count]):
                count += 1
                if self._at_end():
                    self._matcher.rollback(1)
                    count -= 1
                    break
            if count:
                self._matcher.rollback(count)
        return count

    def fill(self, bits: np.ndarray, draft: Seq[int]) -> None:
        """Set what may come next, and after each of the drafts (which `num_possible` let pass).

        bits [len(draft) + 1, words] uint32, token i in bit i % 32 of word i // 32. No token at all after a `failure`.
        """
        for row in range(len(draft) + 1):
            with self._timed():
                if row:
                    self._matcher.accept_token(draft[row - 1])
                self._fill(bits[row : row + 1])
        if draft:
            self._matcher.rollback(len(draft))
        if not bits[0].any():
            self.failure = self.failure or InvalidRequest(
                "the vocabulary has no token with which the grammar can go on", "grammar"
            )
        if self.failure is not None:
            bits[:] = 0

    def _fill(self, bits: np.ndarray) -> None:
        # Rows of what may be a larger array, and int32 as xgrammar takes them.
        self._matcher.fill_next_token_bitmask(bits.view(np.int32))
        if self.complete:
            bits |= self._ends

    def _at_end(self) -> bool:
        """The output matches, and no token may follow."""
        if not self.complete:
            return False
        bits = np.zeros_like(self._ends)
        self._matcher.fill_next_token_bitmask(bits.view(np.int32))
        vocab_size = self._compiled.vocab_size
        bits[0, vocab_size // 32] &= np.uint32((1 << vocab_size % 32) - 1)  # the end, and what is no token at all
        return not bits.any()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        if time.thread_time() - started > MOST_TOKEN_S:
            self.failure = InvalidRequest(
                f"`grammar` is too ambiguous: one token of it takes more than {MOST_TOKEN_S} s", "grammar"
            )


def grammar_masks(batch: Batch, vocab_size: int) -> GrammarMasks | None:
    """The masks of a batch's rows of logits; None where no sequence has a grammar."""
    rows: list[int] = []
    filled: list[np.ndarray] = []
    row = 0
    for i, (seq, count) in enumerate(zip(batch.sequences, batch.num_sampled, strict=True)):
        if count and seq.constraint is not None:
            rows += range(row, row + count)
            filled.append(np.zeros((count, _words(vocab_size)), np.uint32))
            seq.constraint.fill(filled[-1], batch.drafts(i))
        row += count
    return GrammarMasks(rows, np.concatenate(filled)) if rows else None


def _words(vocab_size: int) -> int:
    """Words of a mask: the grammar's end has a bit as well."""
    return vocab_size // 32 + 1


def _not_allowed(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"the grammar does not allow {what}", param)


def why_stuck(seq: Sequence) -> MoeRayError:
    """Why no token could follow those of a sequence."""
    if seq.constraint is not None and seq.constraint.failure is not None:
        return seq.constraint.failure
    return InvalidRequest("`grammar` and the other parameters of the request leave no token to go on with", "grammar")
