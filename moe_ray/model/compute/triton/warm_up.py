"""Has a trunk's kernels compiled before requests come: by made-up batches, one for each kind of launches."""

from __future__ import annotations

from typing import Final

import torch

from moe_ray.core import Batch, Request, SamplingParams, Sequence
from moe_ray.model.compute.base import KVCacheView, TrunkCompute
from moe_ray.model.compute.triton.attention import PARTITION
from moe_ray.model.compute.triton.ops import TOKENS

STEPS: Final = ((1, 0), *((limit + 1, 0) for limit in TOKENS), (1, 2 * PARTITION))
"""Tokens of a chunk, and positions before it: each number of rows that has tiles of its own, and several partitions."""


@torch.inference_mode()
def warm_up(trunk: TrunkCompute, layers: int, cache: KVCacheView, longest: int) -> None:
    """Compute chunks of at most `longest` positions, whose experts return what they are given.

    Reads the first block, whatever is in it, and writes to the spare slot alone. Logits are of all tokens.
    """
    for count, before in STEPS:
        if before + count > longest:
            continue
        work = trunk.begin(_made_up(count, before, cache), cache)
        for layer in range(layers):
            routed = work.route(layer)
            work.add_shared(layer)
            if routed is not None:
                work.combine(routed, routed.rows)
        work.logits(list(range(count)))


def _made_up(count: int, before: int, cache: KVCacheView) -> Batch:
    end = before + count
    sequence = Sequence(Request("", (0,), SamplingParams()), [0] * end)
    sequence.block_table = [0] * -(-end // cache.block_size)
    return Batch(
        [sequence], [0] * count, list(range(before, end)), [cache.spare_slot] * count, [0, count], [end], [count]
    )
