"""Cuts the batch of a step into micro-batches. No torch."""

from __future__ import annotations

from moe_ray.core import Batch


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
        routed=None if batch.routed is None else batch.routed[low:high],  # a view: what a part fills, the whole has
    )
