"""A step's batch, whatever computes it: sequences of made-up tokens over blocks in no order."""

from __future__ import annotations

from moe_ray.core import Batch, Request, SamplingParams, Sequence


def step_batch(chunks: list[tuple[int, int]], block_size: int, blocks_each: int, first: int = 0) -> Batch:
    """One sequence for each (start, end), numbered from `first`; each samples its last position.

    A sequence's blocks are `blocks_each` of its own.
    """
    batch = Batch([], [], [], [], [0], [], [])
    for number, (start, end) in enumerate(chunks, first):
        tokens = [(3 + 7 * i + 11 * number) % 100 for i in range(end)]
        seq = Sequence(Request(str(number), (1,), SamplingParams()), tokens)
        seq.block_table = [blocks_each * number + (7 * b + 3) % blocks_each for b in range(-(-end // block_size))]
        batch.sequences.append(seq)
        batch.token_ids += tokens[start:end]
        batch.positions += range(start, end)
        batch.slot_mapping += [
            seq.block_table[p // block_size] * block_size + p % block_size for p in range(start, end)
        ]
        batch.query_start.append(len(batch.token_ids))
        batch.context_lens.append(end)
        batch.num_sampled.append(1)
    return batch
