"""Which positions of a prompt must give logits, where its log-probabilities are asked for. No torch."""

from __future__ import annotations

from typing import Final

from moe_ray.core import Sequence

MOST_AT_ONCE: Final = 512
"""Tokens of a chunk of a sequence that asks for them: each is a row of logits, as wide as the vocabulary."""


def wants_logits(seq: Sequence) -> bool:
    """Whether a prompt's log-probabilities are asked for and not all told."""
    return seq.request.sampling.prompt_logprobs is not None and seq.num_scored < seq.num_prompt - 1


def num_wanted(seq: Sequence, start: int, end: int) -> int:
    """How many positions at the end of [start, end) must give logits, so that no prompt token is left out."""
    return max(end - max(start, seq.num_scored), 0) if wants_logits(seq) else 0


def chunk_size(seq: Sequence, left: int, budget: int) -> int:
    """How many of the tokens that are left to compute of a sequence a step takes."""
    return min(left, budget, MOST_AT_ONCE) if wants_logits(seq) else min(left, budget)
