"""The scheduler without torch: a fake model whose next token is a hash of the prefix, and a shadow of the KV cache.

The shadow notes for each slot the prefix that was computed into it. Whatever a sequence attends to must be its own
prefix: that is what prefix caching, preemption and block reuse could get wrong.
"""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from moe_ray.core import Batch, FinishReason, Request, SamplingParams, Sequence, Status
from moe_ray.engine.batches import split_batch
from moe_ray.engine.blocks import ROOT_KEY, BlockAllocator, block_key
from moe_ray.engine.drafts import StepCosts
from moe_ray.engine.scheduler import Scheduler, SchedulerLimits

VOCAB = 7
COSTS = StepCosts(num_experts=8, experts_per_token=2)
EOS = frozenset({0})


def next_token(prefix: tuple[int, ...]) -> int:
    """A hash of the whole prefix; where prompts begin with 6, of the last three tokens, so that the text goes round."""
    return zlib.crc32(bytes(prefix[-3:] if prefix[0] == 6 else prefix)) % VOCAB


def reference(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What the request must end in, whatever else the engine does."""
    params, tokens = request.sampling, list(request.prompt_token_ids)
    while True:
        tokens.append(next_token(tuple(tokens)))
        count = len(tokens) - len(request.prompt_token_ids)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
        if count >= params.min_tokens and tokens[-1] in stops:
            return tokens, "stop"
        if count == params.max_tokens or len(tokens) == max_model_len:
            return tokens, "length"


@dataclass(eq=False)
class Harness:
    """Drives a scheduler and checks everything that must hold, step by step."""

    scheduler: Scheduler
    max_model_len: int
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    order: list[Sequence] = field(default_factory=list)
    ended: dict[str, FinishReason] = field(default_factory=dict)
    computed: dict[Sequence, tuple[int, int]] = field(default_factory=dict)  # → (preemptions, computed so far)
    chunked: int = 0
    steps: int = 0
    drafted: int = 0

    def add(self, request: Request) -> Sequence:
        seq = Sequence(request, [*request.prompt_token_ids, *request.output_token_ids])
        self.order.append(seq)
        self.scheduler.add(seq)
        return seq

    def abort(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.ended[seq.request.request_id] = "abort"
        assert not seq.block_table
        self.scheduler.check_integrity()

    def step(self) -> Batch | None:
        scheduler, limits = self.scheduler, self.scheduler.limits
        live = bool(scheduler.running or scheduler.waiting)
        oldest = scheduler.running[0] if scheduler.running else None
        decodes = [s for s in scheduler.running if len(s.token_ids) - s.num_computed == 1]
        plain = self.without_drafts() if limits.num_speculative_tokens else None
        batch = scheduler.schedule()
        scheduler.check_integrity()
        if plain is not None and batch is not None:
            assert plain == self.outline(scheduler, batch), "a draft displaced work that is certain"
        assert (batch is not None) == live, "there is work, and a step without any of it would never end"
        if batch is None:
            return None
        self.steps += 1
        assert 0 < batch.num_tokens <= limits.max_num_batched_tokens
        assert 0 < len(batch.sequences) <= len(scheduler.running) <= limits.max_num_seqs
        assert oldest is None or oldest.status is Status.RUNNING, "the oldest was preempted: nobody is sure to progress"
        self.check_first_come_first_served()
        due = [s for s in decodes if s.status is Status.RUNNING][: limits.max_num_batched_tokens]
        if len(decodes) <= limits.max_num_batched_tokens:
            assert set(due) <= set(batch.sequences), "a decode was starved"
        self.compute(batch)
        sampling = [s for s, count in zip(batch.sequences, batch.num_sampled, strict=True) if count]
        before = {s: list(s.token_ids) for s in sampling}
        sampled = [
            next_token((*s.token_ids, *batch.drafts(i)[:n]))
            for i, s in enumerate(batch.sequences)
            for n in range(batch.num_sampled[i])
        ]
        outcomes = scheduler.update(batch, sampled)
        scheduler.check_integrity()
        assert [outcome.seq for outcome in outcomes] == sampling
        for outcome in outcomes:
            seq, reason, stop_token = outcome.seq, outcome.finish_reason, outcome.stop_token_id
            assert outcome.token_ids
            assert seq.token_ids == [*before[seq], *outcome.token_ids]
            if reason is None:  # just what it would hold without drafts
                assert seq.num_computed == len(seq.token_ids) - 1
                assert len(seq.block_table) == -(-seq.num_computed // scheduler.allocator.block_size)
                self.computed[seq] = (seq.num_preemptions, seq.num_computed)
            else:
                assert seq.request.request_id not in self.ended, "a sequence ended twice"
                self.ended[seq.request.request_id] = reason
                assert seq.status is Status.FINISHED
                assert not seq.block_table
                assert stop_token == (seq.token_ids[-1] if reason == "stop" else None)
        self.check_all_prefixes()
        if limits.num_speculative_tokens:
            self.check_prefix_cache()
        return batch

    def without_drafts(self) -> tuple[list[tuple[str, int]], list[str], int]:
        """What a scheduler in the same state would do if it made no drafts."""
        twin = copy.deepcopy(self.scheduler)
        twin.limits, twin._drafter = replace(twin.limits, num_speculative_tokens=0), None
        return self.outline(twin, twin.schedule())

    @staticmethod
    def outline(scheduler: Scheduler, batch: Batch | None) -> tuple[list[tuple[str, int]], list[str], int]:
        """The certain tokens of each sequence, who waits, and how often somebody was preempted."""
        chosen = []
        for i, seq in enumerate(batch.sequences if batch is not None else []):
            assert batch is not None
            count = batch.query_start[i + 1] - batch.query_start[i] - len(batch.drafts(i))
            chosen.append((seq.request.request_id, count))
        return chosen, [seq.request.request_id for seq in scheduler.waiting], scheduler.preemptions

    def check_prefix_cache(self) -> None:
        """Every block that can be found holds the very prefix that its key stands for: no draft that failed."""
        size = self.scheduler.allocator.block_size
        for key, block in self.scheduler.allocator._block_of.items():
            prefix = self.slots[block * size + size - 1]
            parent = ROOT_KEY
            for start in range(0, len(prefix), size):
                parent = block_key(parent, prefix[start : start + size])
            assert parent == key
            assert all(self.slots[block * size + i] == prefix[: len(prefix) - size + i + 1] for i in range(size))

    def compute(self, batch: Batch) -> None:
        """Write the batch to the shadow, and check every position, token and slot of it."""
        assert len(set(batch.slot_mapping)) == batch.num_tokens, "two tokens would be written to one slot"
        assert len(set(batch.sequences)) == len(batch.sequences)
        for i, seq in enumerate(batch.sequences):
            low, high = batch.query_start[i], batch.query_start[i + 1]
            start, end = batch.positions[low], batch.context_lens[i]
            assert high > low
            assert batch.positions[low:high] == list(range(start, end))
            draft = batch.drafts(i)
            known = end - len(draft)
            assert batch.token_ids[low:high] == [*seq.token_ids[start:known], *draft]
            assert batch.num_sampled[i] == (1 + len(draft) if known == len(seq.token_ids) else 0)
            assert len(draft) <= self.scheduler.limits.num_speculative_tokens
            most = seq.request.sampling.max_tokens
            assert most is None or seq.num_output + 1 + len(draft) <= most or not draft
            assert end < self.max_model_len, "a position that the model does not have"
            assert not draft or known - start == 1
            self.drafted += len(draft)
            preemptions, done = self.computed.get(seq, (-1, 0))
            if preemptions == seq.num_preemptions:
                assert start == done, "a position was computed twice, or left out"
            else:  # it was (re)admitted: all before `start` comes from the prefix cache, in whole blocks
                assert start % self.scheduler.allocator.block_size == 0
                assert start < len(seq.token_ids)
            self.computed[seq] = (seq.num_preemptions, known)
            self.chunked += known < len(seq.token_ids)
            self.check_prefix(seq, start)  # before anything of this step is written
        for i, seq in enumerate(batch.sequences):
            for flat in range(batch.query_start[i], batch.query_start[i + 1]):
                position = batch.positions[flat]
                assert batch.slot_mapping[flat] == self.slot(seq, position)
                whole = (*seq.token_ids, *batch.drafts(i))
                self.slots[batch.slot_mapping[flat]] = whole[: position + 1]
        for i, (seq, end) in enumerate(zip(batch.sequences, batch.context_lens, strict=True)):
            self.check_prefix(seq, end, tuple(batch.drafts(i)))

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.scheduler.allocator.block_size
        return seq.block_table[position // size] * size + position % size

    def check_prefix(self, seq: Sequence, length: int, draft: tuple[int, ...] = ()) -> None:
        whole = (*seq.token_ids, *draft)
        for position in range(length):
            found = self.slots.get(self.slot(seq, position))
            assert found == whole[: position + 1], "a sequence attends to what is not its own prefix"

    def check_all_prefixes(self) -> None:
        for seq in self.scheduler.running:
            self.check_prefix(seq, seq.num_computed)
        assert not any(seq.num_computed or seq.block_table for seq in self.scheduler.waiting)

    def check_first_come_first_served(self) -> None:
        place = {seq: (seq.request.sampling.priority, i) for i, seq in enumerate(self.order)}
        queue = [place[s] for s in [*self.scheduler.running, *self.scheduler.waiting]]
        assert queue == sorted(queue), "somebody overtook an earlier request"


def random_request(rng: random.Random, index: int, max_model_len: int, first: list[int]) -> Request:
    stem = [rng.choice(first)] * rng.randint(1, max_model_len // 2)  # few stems, so that prefixes are shared
    prompt = tuple(stem + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))])[: max_model_len - 1]
    most = rng.choice([None, 1, rng.randint(2, 20)])
    sampling = SamplingParams(
        max_tokens=most,
        min_tokens=rng.choice([0, rng.randint(0, most if most is not None else 6)]),
        stop_token_ids=rng.choice([(), (3,), (3, 4)]),
        ignore_eos=rng.random() < 0.5,
        temperature=0,
    )
    request = Request(f"r{index}", prompt, sampling)
    if rng.random() < 0.25:  # a stream that another trunk began
        whole, _ = reference(request, max_model_len)
        given = rng.randrange(len(whole) - len(prompt))
        request = Request(f"r{index}", prompt, sampling, tuple(whole[len(prompt) : len(prompt) + given]))
    return request


def test_random_workloads() -> None:
    reached: Counter[str] = Counter()
    for seed in range(150):
        try:
            reached += run_workload(seed)
        except AssertionError as error:
            error.add_note(f"workload of seed {seed}")
            raise
    for corner in ("preemptions", "hits", "chunked", "stop", "length", "abort", "aborted_waiting"):
        assert reached[corner] >= 20, f"these workloads prove nothing about {corner}: {reached}"


def test_random_workloads_with_drafts() -> None:
    reached: Counter[str] = Counter()
    for seed in range(40):
        try:
            reached += run_workload(seed, drafts=True)
        except AssertionError as error:
            error.add_note(f"workload of seed {seed} with drafts")
            raise
    for corner in ("preemptions", "hits", "chunked", "stop", "length", "abort", "accepted", "rejected"):
        assert reached[corner] >= 20, f"these workloads prove nothing about {corner}: {reached}"


def run_workload(seed: int, drafts: bool = False) -> Counter[str]:
    """Run one random workload to its end, checking every step; what it came across."""
    reached: Counter[str] = Counter()
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 4, 8])
    max_model_len = rng.randint(8, 40) * (2 if drafts else 1)
    blocks = -(-max_model_len // size) + rng.choice([0, 0, 1, 3, 20])  # as small as an engine accepts, mostly
    limits = SchedulerLimits(
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice([1, 2, 3, 5, 8, 16, 64]),
        enable_prefix_caching=rng.random() < 0.75,
    )
    if drafts:
        shortest = rng.randint(1, 2)
        limits = replace(
            limits,
            num_speculative_tokens=rng.randint(1, 6),
            prompt_lookup_min=shortest,
            prompt_lookup_max=rng.randint(shortest, 4),
        )
    harness = Harness(Scheduler(limits, BlockAllocator(blocks, size), EOS, max_model_len, COSTS), max_model_len)
    first = [1, 6, 6, 6] if drafts else [1, 2]
    requests = [random_request(rng, i, max_model_len, first) for i in range(rng.randint(1, 25))]
    aborts = {i for i in range(len(requests)) if rng.random() < 0.15}
    to_come, work = list(requests), 0
    # Each step computes a token of the oldest or of a decode; what preemption throws away is what bounds the rest.
    most_steps = 40 * sum(len(reference(r, max_model_len)[0]) for r in requests) + 100
    while to_come or harness.scheduler.running or harness.scheduler.waiting:
        while to_come and rng.random() < 0.4:
            harness.add(to_come.pop(0))
        if aborts and rng.random() < 0.2:
            index = rng.choice(sorted(aborts))
            live = [s for s in harness.order if s.request is requests[index] and s.status is not Status.FINISHED]
            if live:
                reached["aborted_waiting"] += live[0].status is Status.WAITING
                harness.abort(live[0])
                aborts.discard(index)
        harness.step()
        work += 1
        assert work < most_steps, "livelock"
    assert set(harness.ended) == {r.request_id for r in requests}, "a sequence never ended"
    assert harness.scheduler.allocator.num_free == blocks
    for seq in harness.order:
        tokens, reason = reference(seq.request, max_model_len)
        ended = harness.ended[seq.request.request_id]
        assert ended in (reason, "abort")
        assert seq.token_ids == (tokens if ended != "abort" else tokens[: len(seq.token_ids)])
        reached[ended] += 1
    if not limits.enable_prefix_caching:
        assert harness.scheduler.prefixes.hit_tokens == 0
    assert harness.scheduler.preemptions == sum(s.num_preemptions for s in harness.order)
    reached["preemptions"] = harness.scheduler.preemptions
    reached["hits"] = harness.scheduler.prefixes.hit_tokens
    reached["chunked"] = harness.chunked
    reached["accepted"] = harness.scheduler.accepted_draft_tokens
    reached["rejected"] = harness.scheduler.draft_tokens - harness.scheduler.accepted_draft_tokens
    assert harness.drafted == harness.scheduler.draft_tokens
    assert not drafts or not (harness.scheduler.drafting and harness.scheduler.drafting._lookup._known), (
        "an index was left"
    )
    return reached


def plain(request_id: str, prompt: list[int], max_tokens: int) -> Request:
    return Request(request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def engine(blocks: int, size: int, max_model_len: int, **limits: int | bool) -> Harness:
    allocator = BlockAllocator(blocks, size)
    return Harness(Scheduler(SchedulerLimits(**limits), allocator, EOS, max_model_len, COSTS), max_model_len)


def test_a_long_prefill_does_not_hold_up_decodes() -> None:
    harness = engine(64, 4, 200, max_num_batched_tokens=8)
    short = harness.add(plain("short", [1, 2, 3], 30))
    harness.step()
    long = harness.add(plain("long", [5] * 100, 2))
    for _ in range(14):
        batch = harness.step()
        assert batch is not None
        assert batch.sequences[0] is short
        assert batch.num_tokens == 8
        assert batch.sequences[1] is long
    assert short.num_output == 15


def test_preemption_takes_the_youngest_and_it_finishes_later_with_the_same_tokens() -> None:
    harness = engine(6, 2, 12, enable_prefix_caching=False)
    old, young = harness.add(plain("old", [1, 2, 3], 8)), harness.add(plain("young", [4, 5, 6], 8))
    while harness.scheduler.running or harness.scheduler.waiting:
        harness.step()
    assert old.num_preemptions == 0
    assert young.num_preemptions > 0
    for seq in (old, young):
        assert seq.token_ids == reference(seq.request, 12)[0]


def test_a_second_request_with_the_same_prompt_computes_its_last_block_only() -> None:
    harness = engine(32, 4, 64)
    harness.add(plain("a", [1] * 16, 1))
    harness.step()
    again = harness.add(plain("b", [1] * 16, 1))
    batch = harness.step()
    assert batch is not None
    assert batch.positions == [12, 13, 14, 15], "at least one token is computed, for its logits"
    assert again.num_cached_prompt == harness.scheduler.prefixes.hit_tokens == 12


def test_output_is_cached_for_the_next_turn_of_a_conversation() -> None:
    harness = engine(32, 4, 64)
    first = harness.add(plain("a", [1] * 5, 12))
    while harness.scheduler.running or harness.scheduler.waiting:
        harness.step()
    second = harness.add(plain("b", [*first.token_ids, 2, 2], 1))
    harness.step()
    assert second.num_cached_prompt == 16  # of the 17 known tokens 16 were computed: four whole blocks


def test_max_num_seqs_and_arrival_order() -> None:
    harness = engine(64, 4, 32, max_num_seqs=2)
    sequences = [harness.add(plain(str(i), [1, 2], 2)) for i in range(5)]
    while harness.scheduler.running or harness.scheduler.waiting:
        harness.step()
    assert list(harness.ended) == [s.request.request_id for s in sequences]


def test_a_lower_number_goes_first_and_is_preempted_last() -> None:
    harness = engine(6, 2, 12, max_num_seqs=2, enable_prefix_caching=False)
    for i, priority in enumerate([0, 5, -1, 5, 0]):
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, priority=priority)
        harness.add(Request(str(i), (1, 2, i), sampling))
    turns = [(s.request.sampling.priority, s.request.request_id) for s in harness.scheduler.waiting]
    assert turns == [(-1, "2"), (0, "0"), (0, "4"), (5, "1"), (5, "3")]
    sequences = {seq.request.request_id: seq for seq in harness.scheduler.waiting}
    while harness.scheduler.running or harness.scheduler.waiting:
        harness.step()
    assert sequences["2"].num_preemptions == 0
    assert next(iter(harness.ended)) == "2"
    assert list(harness.ended)[-1] == "3"
    assert harness.scheduler.preemptions > 0
    for seq in sequences.values():
        assert seq.token_ids == reference(seq.request, 12)[0]


@pytest.mark.parametrize("seed", range(40))
def test_split_partitions_exactly(seed: int) -> None:
    rng = random.Random(seed)
    harness = engine(256, 4, 64, max_num_seqs=32, max_num_batched_tokens=rng.randint(20, 200))
    for i in range(rng.randint(1, 12)):
        harness.add(plain(str(i), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))], 4))
    for _ in range(3):
        batch = harness.step()
        assert batch is not None
        for parts in range(1, 7):
            cut = split_batch(batch, parts)
            assert 1 <= len(cut) <= min(parts, len(batch.sequences))
            for name in ("sequences", "token_ids", "positions", "slot_mapping", "context_lens", "num_sampled"):
                assert [item for part in cut for item in getattr(part, name)] == getattr(batch, name)
            lengths = [b - a for part in cut for a, b in zip(part.query_start, part.query_start[1:], strict=False)]
            assert lengths == [b - a for a, b in zip(batch.query_start, batch.query_start[1:], strict=False)], (
                "a sequence was cut, or lost its length"
            )
            assert all(part.query_start[0] == 0 and part.query_start[-1] == part.num_tokens for part in cut)


def loop_of(harness: Harness, tokens: int) -> Sequence:
    """A sequence that generates ever the same token, and is known to."""
    prompt = next([6] + [i] * 8 for i in range(VOCAB) if next_token((6, i, i, i)) == i)
    return harness.add(plain(f"loop{len(harness.order)}", prompt, tokens))


def until_done(harness: Harness) -> list[int]:
    """Tokens per step."""
    counts = []
    while harness.scheduler.running or harness.scheduler.waiting:
        before = sum(len(s.token_ids) for s in harness.order)
        harness.step()
        counts.append(sum(len(s.token_ids) for s in harness.order) - before)
    return counts


def test_a_loop_comes_in_long_steps_and_ends_exactly() -> None:
    for tokens in range(1, 30):
        harness = engine(64, 4, 200, num_speculative_tokens=4)
        loop_of(harness, tokens)
        counts = until_done(harness)
        assert sum(counts) == tokens
        assert max(counts) == min(5, max(tokens - 1, 1))
        assert harness.scheduler.accepted_draft_tokens == harness.scheduler.draft_tokens
        if tokens > 20:
            assert len(counts) < tokens / 3


def test_drafts_stop_before_the_context_length() -> None:
    harness = engine(5, 4, 20, num_speculative_tokens=16)
    loop_of(harness, 100)
    until_done(harness)
    assert len(harness.order[0].token_ids) == 20
    assert harness.ended == {"loop0": "length"}


def test_drafts_take_what_budget_is_left() -> None:
    harness = engine(256, 4, 200, num_speculative_tokens=4, max_num_batched_tokens=11)
    for _ in range(3):
        loop_of(harness, 150)
    while any(s.num_output < 10 for s in harness.order):
        harness.step()
    batch = harness.step()
    assert batch is not None
    assert [len(batch.drafts(i)) for i in range(3)] == [4, 4, 0]
    newcomer = harness.add(plain("new", [5] * 30, 2))
    batch = harness.step()
    assert batch is not None
    assert batch.sequences[-1] is newcomer
    assert not any(batch.drafts(i) for i in range(4)), "the prompt had a use for all that was left"


def test_drafts_take_only_blocks_that_are_free() -> None:
    harness = engine(6, 4, 24, num_speculative_tokens=4, enable_prefix_caching=False)
    one, two = loop_of(harness, 8), loop_of(harness, 8)  # prompts of 9 tokens: with three blocks each, all are held
    harness.step()
    assert harness.scheduler.allocator.num_free == 0
    batch = harness.step()
    assert batch is not None
    assert [len(batch.drafts(i)) for i in range(2)] == [2, 2], "what is left of their own last blocks"
    until_done(harness)
    assert (one.num_output, two.num_output) == (8, 8)


def test_wrong_drafts_hold_no_block_afterwards() -> None:
    harness = engine(16, 1, 16, num_speculative_tokens=3)
    seq = harness.add(plain("wrong", [1, 2, 3, 4, 1, 2], 6))  # a hash of the whole prefix: hardly ever as before
    harness.step()
    while seq.status is not Status.FINISHED:
        harness.step()
        assert len(seq.block_table) == seq.num_computed
    assert harness.scheduler.draft_tokens > harness.scheduler.accepted_draft_tokens


def test_equal_decodes_split_evenly() -> None:
    harness = engine(256, 4, 64)
    for i in range(9):
        harness.add(plain(str(i), [1], 9))
    harness.step()
    batch = harness.step()
    assert batch is not None
    assert [len(part.sequences) for part in split_batch(batch, 3)] == [3, 3, 3]


def test_runs_without_torch() -> None:
    code = "import sys, moe_ray.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
