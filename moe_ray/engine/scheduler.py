"""Decides what each step computes: continuous batching, chunked prefill, prefix caching, preemption. No torch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from moe_ray.core import Batch, FinishReason, Sequence, Status
from moe_ray.engine.blocks import ROOT_KEY, BlockAllocator, block_key


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step may hold."""

    max_num_seqs: int = 64
    """Sequences in one step."""
    max_num_batched_tokens: int = 512
    """Tokens in one step; longer prefills are cut into chunks."""
    max_waiting: int = 1024
    """Sequences that may wait to be admitted."""
    enable_prefix_caching: bool = True


class Scheduler:
    """Owns every live sequence and its blocks; first come, first served. One thread."""

    def __init__(
        self, limits: SchedulerLimits, allocator: BlockAllocator, eos_token_ids: frozenset[int], max_model_len: int
    ) -> None:
        self.limits, self.allocator = limits, allocator
        self._eos, self._max_model_len = eos_token_ids, max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits the model and the cache."""
        self.waiting.append(seq)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, whatever its state, and give its blocks back."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED

    def schedule(self) -> Batch | None:
        """Choose the next step's tokens and give them slots; None when there is nothing to do.

        Decodes come first (they are short and somebody is reading them), then prefill chunks in order of arrival,
        then new sequences. When blocks run out the youngest running sequence is preempted: its blocks are freed and
        it is recomputed later, from the prefix cache where that still holds it.
        """
        budget, preemptions = self.limits.max_num_batched_tokens, self.preemptions
        chosen: list[tuple[Sequence, int]] = []
        # A copy: preemption takes from the tail of self.running while we walk. An unfinished prefill used up its step's
        # budget, so nobody was admitted behind it: it is the last one, and the decodes come first as promised.
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:
                continue
            count = min(len(seq.token_ids) - seq.num_computed, budget)
            if count and self._reserve(seq, count):
                chosen.append((seq, count))
                budget -= count
        while (
            self.waiting
            and budget
            and len(self.running) < self.limits.max_num_seqs
            and self.preemptions == preemptions  # a step that had to evict admits nobody
        ):
            count = self._admit(self.waiting[0], budget)
            if not count:
                break
            seq = self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            chosen.append((seq, count))
            budget -= count
        return self._batch(chosen) if chosen else None

    def update(self, batch: Batch, sampled: list[int]) -> list[tuple[Sequence, FinishReason | None, int | None]]:
        """Take in a computed step and its sampled tokens (one per sequence that sampled, in order).

        Returns (sequence, finish reason or None, stop token id or None) of each sampled sequence; finished ones are
        out of the scheduler.
        """
        results = []
        tokens = iter(sampled)
        for seq, context, sample in zip(batch.sequences, batch.context_lens, batch.sample, strict=True):
            self._advance(seq, context)
            if sample:
                token = next(tokens)
                seq.token_ids.append(token)
                reason, stop_token = self._finish_reason(seq, token)
                if reason is not None:
                    self.finish(seq)
                results.append((seq, reason, stop_token))
        return results

    def check_integrity(self) -> None:
        """Raise AssertionError if block bookkeeping is inconsistent."""
        self.allocator.check_integrity(seq.block_table for seq in [*self.running, *self.waiting])

    def _reserve(self, seq: Sequence, count: int) -> bool:
        """Give `seq` blocks for its next `count` tokens, preempting younger ones; False if it was preempted itself."""
        needed = -(-(seq.num_computed + count) // self.allocator.block_size) - len(seq.block_table)
        if needed <= 0:
            return True
        while (blocks := self.allocator.allocate(needed)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        seq.block_table += blocks
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        seq.num_preemptions += 1
        self.preemptions += 1

    def _admit(self, seq: Sequence, budget: int) -> int:
        """Give a waiting sequence its cached prefix and blocks for a first chunk; the chunk's tokens, 0 if no room."""
        size, known = self.allocator.block_size, len(seq.token_ids)
        cached: list[int] = []
        if self.limits.enable_prefix_caching:
            # At least one token is computed, because its logits are wanted.
            self._extend_keys(seq, (known - 1) // size)
            cached = self.allocator.lookup(seq.block_keys[: (known - 1) // size])
        start = len(cached) * size
        # Admit only if the whole known sequence would fit now, so that a long prompt does not start, stall and thrash.
        if -(-known // size) - len(cached) > self.allocator.num_free:
            self.allocator.release(cached)
            return 0
        count = min(known - start, budget)
        blocks = self.allocator.allocate(-(-(start + count) // size) - len(cached))
        assert blocks is not None
        seq.block_table, seq.num_computed = cached + blocks, start
        if not seq.num_preemptions:
            seq.num_cached_prompt = min(start, seq.num_prompt)
        self.prefix_hit_tokens += start
        return count

    def _release(self, seq: Sequence) -> None:
        self.allocator.release(seq.block_table)
        seq.block_table, seq.num_computed = [], 0

    def _extend_keys(self, seq: Sequence, blocks: int) -> None:
        size = self.allocator.block_size
        for i in range(len(seq.block_keys), blocks):
            parent = seq.block_keys[-1] if seq.block_keys else ROOT_KEY
            seq.block_keys.append(block_key(parent, seq.token_ids[i * size : (i + 1) * size]))

    def _advance(self, seq: Sequence, context: int) -> None:
        """Note that the first `context` tokens are computed; blocks that this filled become findable."""
        size = self.allocator.block_size
        old, new = seq.num_computed // size, context // size
        seq.num_computed = context
        if new > old and self.limits.enable_prefix_caching:
            self._extend_keys(seq, new)
            for block, key in zip(seq.block_table[old:new], seq.block_keys[old:new], strict=True):
                self.allocator.register(block, key)

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = seq.request.sampling
        if seq.num_output >= params.min_tokens and (
            token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        ):
            return "stop", token
        if params.max_tokens is not None and seq.num_output >= params.max_tokens:
            return "length", None
        if len(seq.token_ids) >= self._max_model_len:
            return "length", None
        return None, None

    def _batch(self, chosen: list[tuple[Sequence, int]]) -> Batch:
        batch = Batch([], [], [], [], [0], [], [])
        size = self.allocator.block_size
        for seq, count in chosen:
            start, end = seq.num_computed, seq.num_computed + count
            batch.sequences.append(seq)
            batch.token_ids += seq.token_ids[start:end]
            batch.positions += range(start, end)
            batch.slot_mapping += [seq.block_table[p // size] * size + p % size for p in range(start, end)]
            batch.query_start.append(len(batch.token_ids))
            batch.context_lens.append(end)
            batch.sample.append(end == len(seq.token_ids))
        return batch


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into at most `parts` micro-batches of whole sequences with about equal tokens, in order."""
    if parts <= 1 or len(batch.sequences) <= 1:
        return [batch]
    out: list[Batch] = []
    first, goal = 0, batch.num_tokens / parts
    for i in range(len(batch.sequences)):
        last = i == len(batch.sequences) - 1
        if last or (batch.query_start[i + 1] >= goal * (len(out) + 1) and len(out) < parts - 1):
            out.append(_part(batch, first, i + 1))
            first = i + 1
    return out


def _part(batch: Batch, first: int, end: int) -> Batch:
    low, high = batch.query_start[first], batch.query_start[end]
    return Batch(
        sequences=batch.sequences[first:end],
        token_ids=batch.token_ids[low:high],
        positions=batch.positions[low:high],
        slot_mapping=batch.slot_mapping[low:high],
        query_start=[q - low for q in batch.query_start[first : end + 1]],
        context_lens=batch.context_lens[first:end],
        sample=batch.sample[first:end],
    )
