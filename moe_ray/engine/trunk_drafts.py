"""A draft model in the trunk's process, computed like any model of ours: paged KV, in batches, by the same kernels.

Its K and V lie in a cache of its own, at the same slots as the target model's: one allocator, one block table for each
sequence, and nothing to roll back but a number. What a rejected draft left there is overwritten, or not read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_ray.core import Batch, Sequence
from moe_ray.engine.adjustments import GrammarMasks
from moe_ray.engine.draft_model import DraftPass
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.sampler import sample
from moe_ray.engine.torch_threads import torch_threads
from moe_ray.model.trunk import Trunk, interleave


@dataclass(slots=True)
class _Progress:
    """How far one sequence is computed."""

    computed: int = 0
    """Leading tokens whose K and V are in the cache, of those that were certain."""
    length: int = 0
    """Of the sequence when its drafts were made."""
    fed: list[int] = field(default_factory=list)
    """Drafts behind these tokens whose K and V are in the cache as well."""
    preemptions: int = 0
    """Of the sequence by then: it loses its blocks by one."""


class TrunkDrafts:
    """`DraftModel` by a `Trunk` of its own, whose experts are in this process."""

    def __init__(
        self,
        trunk: Trunk,
        cache: KVCache,
        *,
        end_token_ids: frozenset[int] = frozenset(),
        max_positions: int,
        most_tokens: int,
        weight_bytes: int = 0,
    ) -> None:
        """`cache`: with the blocks of the target's. `max_positions`: that the trunk has a table for.

        `most_tokens`: what one call computes of tokens that were certain. `end_token_ids`: of the target model.
        """
        self._trunk, self._cache = trunk, cache
        self._ends, self._max_positions, self._most_tokens = end_token_ids, max_positions, most_tokens
        self._progress: dict[Sequence, _Progress] = {}
        self._filled: list[bytes | None] = [None] * cache.num_blocks
        """Block → the key of the prefix that it ends, where all its K and V are here: prefixes are shared here, too."""
        self.passes: list[DraftPass] = []
        self.nbytes = weight_bytes + cache.nbytes

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        self.passes = []
        drafts: list[list[int]] = [[] for _ in sequences]
        live = self._catch_up(sequences, counts, drafts)
        while live:
            batch = _Rows(self._cache.block_size)
            for i in live:
                seq, newest = sequences[i], drafts[i][-1]
                batch.add(seq, [newest], len(seq.token_ids) + len(drafts[i]) - 1, logits=True)
                self._forget(seq, batch.start_block)
                self._progress[seq].fed.append(newest)
            live = self._extend(live, batch.batch, sequences, counts, drafts)
        return drafts

    def behind(self, seq: Sequence) -> int:
        """Tokens of a sequence that it has to compute before it can guess: at least its newest one."""
        return len(seq.token_ids) - self._computed(seq)

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence. Idempotent."""
        self._progress.pop(seq, None)

    def _catch_up(self, sequences: Seq[Sequence], counts: Seq[int], drafts: list[list[int]]) -> list[int]:
        """Compute what became certain, at most `most_tokens` of it; the sequences that have their first draft."""
        rows, left, ready = _Rows(self._cache.block_size), self._most_tokens, []
        for i, (seq, count) in enumerate(zip(sequences, counts, strict=True)):
            known = len(seq.token_ids)
            if known + count - 1 > self._max_positions:
                continue
            start = self._computed(seq)
            end = min(start + left, known)
            if end > start:
                rows.add(seq, seq.token_ids[start:end], start, logits=end == known)
                self._forget(seq, rows.start_block)
                self._progress[seq] = _Progress(end, known, [], seq.num_preemptions)
                left -= end - start
                if end == known:
                    ready.append(i)
        if not rows.batch.sequences:
            return []
        live = self._extend(ready, rows.batch, sequences, counts, drafts)
        for i, seq in enumerate(rows.batch.sequences):
            self._keep(seq, rows.batch.positions[rows.batch.query_start[i]])
        return live

    def _extend(
        self, rows: list[int], batch: Batch, sequences: Seq[Sequence], counts: Seq[int], drafts: list[list[int]]
    ) -> list[int]:
        """Compute a batch whose logits are of the sequences `rows`, and give each of these a draft more.

        Returns those that are to have another one.
        """
        started = time.perf_counter()
        with torch_threads(1) if self._trunk.own_threads else contextlib.nullcontext():
            (logits,) = interleave([self._trunk.forward(batch, self._cache)])
        # The target's own noise, penalties and masks: so the two agree as often as their distributions let them.
        owners = [sequences[i] for i in rows]
        before = [drafts[i] for i in rows]
        masks = _masks(owners, before, logits.shape[-1])
        chosen = sample(logits, owners, self._ends, before, masks, logprobs=False).token_ids if rows else []
        self.passes.append(DraftPass(batch.num_tokens, time.perf_counter() - started))
        going_on = []
        for i, token in zip(rows, chosen, strict=True):
            if token < 0:
                continue
            drafts[i].append(token)
            seq = sequences[i]
            ends = token in self._ends and not seq.request.sampling.ignore_eos
            if len(drafts[i]) < counts[i] and not ends and _allows(seq, drafts[i]):
                going_on.append(i)
        return going_on

    def _computed(self, seq: Sequence) -> int:
        """Leading tokens of a sequence that are in the cache; never all: its newest one gives the next draft."""
        progress = self._progress.get(seq)
        if progress is None or progress.preemptions != seq.num_preemptions:
            computed = self._shared(seq)
        else:
            computed = progress.computed
            if computed == progress.length:
                for fed, token in zip(progress.fed, seq.token_ids[progress.length :], strict=False):
                    if fed != token:
                        break
                    computed += 1
        return min(computed, len(seq.token_ids) - 1)

    def _shared(self, seq: Sequence) -> int:
        """Tokens of a sequence's leading blocks that are here already, of another sequence or its own past."""
        blocks = 0
        for block, key in zip(seq.block_table, seq.block_keys, strict=False):
            if self._filled[block] != key:
                break
            blocks += 1
        return blocks * self._cache.block_size

    def _forget(self, seq: Sequence, start_block: int) -> None:
        """Note that blocks of a sequence are written from the given one on."""
        for block in seq.block_table[start_block:]:
            self._filled[block] = None

    def _keep(self, seq: Sequence, start: int) -> None:
        """Note which blocks hold what their keys say, now that tokens from position `start` on were computed.

        And the one before: when it was filled, its key was not known yet.
        """
        size = self._cache.block_size
        some = slice(max(start - 1, 0) // size, self._progress[seq].computed // size)
        for block, key in zip(seq.block_table[some], seq.block_keys[some], strict=False):
            self._filled[block] = key


class _Rows:
    """A batch of the draft model that is being put together."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self.batch = Batch([], [], [], [], [0], [], [])
        self.start_block = 0
        """Index in its block table of the first block that the last added sequence is written to."""

    def add(self, seq: Sequence, token_ids: list[int], start: int, *, logits: bool) -> None:
        """Tokens of a sequence from position `start` on; `logits`: of the last of them."""
        batch, size = self.batch, self._size
        positions = range(start, start + len(token_ids))
        batch.sequences.append(seq)
        batch.token_ids += token_ids
        batch.positions += positions
        batch.slot_mapping += [seq.block_table[p // size] * size + p % size for p in positions]
        batch.query_start.append(len(batch.token_ids))
        batch.context_lens.append(positions.stop)
        batch.num_sampled.append(int(logits))
        self.start_block = start // size


def _masks(sequences: Seq[Sequence], drafts: Seq[Seq[int]], vocab_size: int) -> GrammarMasks | None:
    """What each sequence's grammar lets follow its drafts; None where none has one."""
    rows = [i for i, seq in enumerate(sequences) if seq.constraint is not None]
    if not rows:
        return None
    filled = []
    for i in rows:
        constraint, draft = sequences[i].constraint, list(drafts[i])
        assert constraint is not None
        bits = np.zeros((len(draft) + 1, vocab_size // 32 + 1), np.uint32)
        constraint.fill(bits, draft)
        filled.append(bits[-1:])
    return GrammarMasks(rows, np.concatenate(filled))


def _allows(seq: Sequence, draft: list[int]) -> bool:
    """Whether the grammar lets a token follow these drafts."""
    return seq.constraint is None or seq.constraint.num_possible(draft) == len(draft)
