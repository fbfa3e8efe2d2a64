"""Decides what each step computes: batching, chunked prefill, prefix caching, preemption, drafts. No torch."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from moe_ray.core import Batch, FinishReason, Sequence, Status
from moe_ray.engine.batches import by_adapter, make_batch
from moe_ray.engine.blocks import BlockAllocator
from moe_ray.engine.draft_model import DraftModel
from moe_ray.engine.drafting import Ask, Drafting, Speculation
from moe_ray.engine.drafts import StepCosts, num_accepted
from moe_ray.engine.lower_tiers import LowerTiers
from moe_ray.engine.prefixes import Prefixes
from moe_ray.engine.prompt_positions import chunk_size


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
    num_speculative_tokens: int = 0
    """Most drafts per sequence and step; 0: no speculative decoding."""
    speculation: Speculation = "ngram"
    """Where drafts come from."""
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step brought one sequence."""

    seq: Sequence
    token_ids: tuple[int, ...]
    """The new tokens, already appended: 1, more where drafts came true, none where only the prompt was asked for."""
    finish_reason: FinishReason | None
    stop_token_id: int | None
    index: int
    """Of the sequence in the batch."""
    stuck: bool = False
    """The sequence ended because no token was allowed: its last one lacks."""


class Scheduler:
    """Owns every live sequence and its blocks; by priority, then first come, first served. One thread."""

    def __init__(
        self,
        limits: SchedulerLimits,
        allocator: BlockAllocator,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        costs: StepCosts,
        draft_model: DraftModel | None = None,
        tiers: LowerTiers | None = None,
    ) -> None:
        """`draft_model`: for drafts of such a model, where `limits` say so. `tiers`: below the KV cache."""
        self.limits, self.allocator = limits, allocator
        self._eos, self._max_model_len = eos_token_ids, max_model_len
        # Both in the order of (priority, arrival).
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._arrivals = 0
        self.preemptions = 0
        self.prefixes = Prefixes(allocator, limits.enable_prefix_caching, tiers)
        self.drafts = self.draft_tokens = self.accepted_draft_tokens = 0
        self.drafting = Drafting(limits, costs, draft_model) if limits.num_speculative_tokens else None

    def add(self, seq: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits the model and the cache."""
        seq.arrival = self._arrivals
        self._arrivals += 1
        insort(self.waiting, seq, key=_turn)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, whatever its state, and give its blocks back."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        if self.drafting is not None:
            self.drafting.drop(seq)

    def schedule(self) -> Batch | None:
        """Choose the next step's tokens and give them slots; None when there is nothing to do.

        Running sequences come first, in the order of (priority, arrival), then new ones. Among sequences of one
        priority this means: decodes first (they are short and somebody is reading them), then prefill chunks. When
        blocks run out the last running sequence is preempted: its blocks are freed and it is recomputed later, from
        the prefix cache where that still holds it. Drafts take what all these left.
        """
        budget, preemptions = self.limits.max_num_batched_tokens, self.preemptions
        chosen: list[tuple[Sequence, int]] = []
        # A copy: preemption takes from the tail of self.running while we walk. An unfinished prefill used up its step's
        # budget, so nobody was admitted behind it: it is the last one, and the decodes come first as promised.
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:
                continue
            count = chunk_size(seq, len(seq.token_ids) - seq.num_computed, budget)
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
            insort(self.running, seq, key=_turn)
            chosen.append((seq, count))
            budget -= count
        if not chosen:
            return None
        drafts = self._drafts(chosen, budget)
        return make_batch(*by_adapter(chosen, drafts), self.allocator.block_size)

    def update(self, batch: Batch, sampled: list[int]) -> list[Outcome]:
        """Take in a computed step and what was sampled at its `num_sampled` positions, in order.

        Returns the outcome of each sequence that sampled or ended; finished ones are out of the scheduler. What was
        sampled after a wrong draft, or after the sequence's end, is dropped.
        """
        outcomes, used = [], 0
        for i, (seq, context, count) in enumerate(
            zip(batch.sequences, batch.context_lens, batch.num_sampled, strict=True)
        ):
            if count:
                outcomes.append(self._take(i, seq, batch.drafts(i), sampled[used : used + count]))
                used += count
            else:
                self._advance(seq, context)
                if context == len(seq.token_ids):  # its prompt is computed, and nothing else was asked for
                    self.finish(seq)
                    outcomes.append(Outcome(seq, (), "length", None, i))
        return outcomes

    def check_integrity(self) -> None:
        """Raise AssertionError if block bookkeeping is inconsistent."""
        self.allocator.check_integrity(seq.block_table for seq in [*self.running, *self.waiting])

    def _take(self, index: int, seq: Sequence, draft: list[int], sampled: list[int]) -> Outcome:
        """Append the tokens that are certain, up to the sequence's end, and note what of the cache is true."""
        accepted = num_accepted(draft, sampled)
        if self.drafting is not None:
            self.drafting.learn(seq, sampled[: accepted + 1])
        before = len(seq.token_ids)
        reason, stop_token, stuck = None, None, False
        for token in sampled[: accepted + 1]:
            if stuck := token < 0:
                break
            seq.token_ids.append(token)
            reason, stop_token = self._finish_reason(seq, token)
            if reason != "stop" and seq.constraint is not None:
                reason = "stop" if seq.constraint.ends_with(token) else reason
            if reason is not None:
                break
        new = tuple(seq.token_ids[before:])
        self._advance(seq, len(seq.token_ids) - 1)
        if self.drafting is not None:
            self.drafts += bool(draft)
            self.draft_tokens += len(draft)
            self.accepted_draft_tokens += min(accepted, len(new))
            self.drafting.count(seq, len(draft), min(accepted, len(new)))
            self._trim(seq)
        if reason is not None or stuck:
            self.finish(seq)
        return Outcome(seq, new, reason, stop_token, index, stuck)

    def _drafts(self, chosen: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
        """Guess what follows each chosen sequence that decodes, within the budget and the blocks nobody else needs."""
        if self.drafting is None:
            return [[]] * len(chosen)
        asks = []
        for seq, count in chosen:
            decodes = count == 1 and seq.num_computed + 1 == len(seq.token_ids)
            # A step yields one token more than it has right drafts.
            most = min(self.limits.num_speculative_tokens, self._tokens_left(seq) - 1) if decodes else 0
            asks.append(Ask(seq, most))
        tokens = self.limits.max_num_batched_tokens - budget
        return self.drafting.propose(asks, tokens, budget, self._extra_slots)

    def _extra_slots(self, seq: Sequence, wanted: int) -> int:
        """Give `seq` at most `wanted` slots behind its newest token, as far as blocks are free; return how many."""
        size, end = self.allocator.block_size, seq.num_computed + 1
        needed = -(-(end + wanted) // size) - len(seq.block_table)
        blocks = self.allocator.allocate(min(needed, self.allocator.num_free)) if needed > 0 else None
        seq.block_table += blocks or []
        return min(wanted, len(seq.block_table) * size - end)

    def _trim(self, seq: Sequence) -> None:
        """Give back blocks that only wrong drafts used: nobody is preempted for want of them."""
        keep = -(-seq.num_computed // self.allocator.block_size)
        self.allocator.release(seq.block_table[keep:])
        del seq.block_table[keep:]

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
        insort(self.waiting, seq, key=_turn)
        seq.num_preemptions += 1
        self.preemptions += 1

    def _admit(self, seq: Sequence, budget: int) -> int:
        """Give a waiting sequence its cached prefix and blocks for a first chunk; the chunk's tokens, 0 if no room."""
        size, known = self.allocator.block_size, len(seq.token_ids)
        # Admit only if the whole known sequence would fit now, so that a long prompt does not start, stall and thrash.
        found = self.prefixes.take(seq, -(-known // size))
        if found is None:
            return 0
        cached, lent = found
        start = (len(cached) + lent) * size
        count = chunk_size(seq, known - start, budget)
        blocks = self.allocator.allocate(-(-(start + count) // size) - len(cached))
        assert blocks is not None
        seq.block_table, seq.num_computed = cached + blocks, start
        self.prefixes.load(seq, len(cached), lent)
        if not seq.num_preemptions:
            seq.num_cached_prompt = min(start, seq.num_prompt)
        self.prefixes.count(seq, start)
        return count

    def _release(self, seq: Sequence) -> None:
        self.allocator.release(seq.block_table)
        seq.block_table, seq.num_computed = [], 0

    def _advance(self, seq: Sequence, context: int) -> None:
        """Note that the first `context` tokens are computed; blocks that this filled become findable."""
        size = self.allocator.block_size
        old, new = seq.num_computed // size, context // size
        seq.num_computed = context
        self.prefixes.register(seq, old, new)

    def _tokens_left(self, seq: Sequence) -> int:
        """How many tokens the sequence may still grow by."""
        most = seq.request.sampling.max_tokens
        left = self._max_model_len - len(seq.token_ids)
        return left if most is None else min(left, most - seq.num_output)

    def _finish_reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        params = seq.request.sampling
        if seq.num_output >= params.min_tokens and (
            token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        ):
            return "stop", token
        if self._tokens_left(seq) <= 0:
            return "length", None
        return None, None


def _turn(seq: Sequence) -> tuple[int, int]:
    """What comes first is computed first."""
    return seq.request.sampling.priority, seq.arrival
