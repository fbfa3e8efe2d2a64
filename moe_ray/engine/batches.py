"""Makes the batch of a step, and cuts it into micro-batches. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from moe_ray.core import Batch, Sequence
from moe_ray.engine.prompt_positions import num_wanted


def by_adapter(
    chosen: Seq[tuple[Sequence, int]], drafts: Seq[list[int]]
) -> tuple[list[tuple[Sequence, int]], list[list[int]]]:
    """The same with sequences of one adapter side by side, ids ascending, so that an expert's rows of one are, too."""
    order = sorted(range(len(chosen)), key=lambda index: chosen[index][0].request.adapter_id)
    return [chosen[index] for index in order], [drafts[index] for index in order]


def make_batch(chosen: Seq[tuple[Sequence, int]], drafts: Seq[list[int]], block_size: int) -> Batch:
    """The batch of the next `count` tokens of each chosen sequence, its drafts behind them; its blocks are there."""
    batch = Batch([], [], [], [], [0], [], [])
    scored: list[int] = []
    for (seq, count), draft in zip(chosen, drafts, strict=True):
        start, end = seq.num_computed, seq.num_computed + count
        last = end == len(seq.token_ids) and seq.request.sampling.max_tokens != 0
        scored.append(num_wanted(seq, start, end - last))
        batch.sequences.append(seq)
        batch.token_ids += seq.token_ids[start:end]
        batch.token_ids += draft
        end += len(draft)
        batch.positions += range(start, end)
        batch.slot_mapping += [
            seq.block_table[p // block_size] * block_size + p % block_size for p in range(start, end)
        ]
        batch.query_start.append(len(batch.token_ids))
        batch.context_lens.append(end)
        batch.num_sampled.append(1 + len(draft) if last else 0)
    if any(scored):
        batch.num_scored = scored
    adapter_ids = [seq.request.adapter_id for seq in batch.sequences]
    if any(adapter_ids):
        batch.adapter_ids = adapter_ids
    return batch


def split_batch(batch: Batch, parts: int) -> list[Batch]:
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
        num_sampled=batch.num_sampled[first:end],
        num_scored=batch.num_scored[first:end],
        routed=None if batch.routed is None else batch.routed[low:high],  # a view: what a part fills, the whole has
        layer_times=batch.layer_times,  # one list for all parts
        adapter_ids=batch.adapter_ids[first:end],
    )


def sampled_sequences(batch: Batch) -> tuple[list[Sequence], list[list[int]]]:
    """The sequence of each row of a batch's logits, and the drafts that lie before it (no list at all if none do)."""
    if max(batch.num_sampled) <= 1:
        return [seq for seq, count in zip(batch.sequences, batch.num_sampled, strict=True) if count], []
    sequences: list[Sequence] = []
    drafts: list[list[int]] = []
    for i, (seq, count) in enumerate(zip(batch.sequences, batch.num_sampled, strict=True)):
        draft = batch.drafts(i)
        sequences += [seq] * count
        drafts += [draft[:n] for n in range(count)]
    return sequences, drafts
