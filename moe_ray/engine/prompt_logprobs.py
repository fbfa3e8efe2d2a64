"""Log-probabilities of prompt tokens, from the logits of a step."""

from __future__ import annotations

import torch

from moe_ray.core import Batch, Sequence, TokenEvent, TokenLogprobs
from moe_ray.engine.token_logprobs import token_logprobs


def sampled_rows(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Those rows of a batch's logits that are sampled, [sum(num_sampled), V]."""
    if not batch.num_scored:
        return logits
    rows, at = list[int](), 0
    for scored, sampled in zip(batch.num_scored, batch.num_sampled, strict=True):
        rows += range(at + scored, at + scored + sampled)
        at += scored + sampled
    return logits[torch.tensor(rows, dtype=torch.long, device=logits.device)]


def take(batch: Batch, logits: torch.Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
    """What a step's logits say of prompt tokens that were not told yet; number of the sequence in the batch → them.

    They are told with that: `num_scored` of each sequence grows.
    """
    found: dict[int, tuple[TokenLogprobs, ...]] = {}
    if not batch.num_scored:
        return found
    at = 0
    for i, (scored, sampled) in enumerate(zip(batch.num_scored, batch.num_sampled, strict=True)):
        if scored:
            seq = batch.sequences[i]
            count = seq.request.sampling.prompt_logprobs or 0
            # A replayed sequence's chunk may go on behind the prompt.
            scored_now = min(scored, seq.num_prompt - 1 - seq.num_scored)
            targets = seq.token_ids[seq.num_scored + 1 : seq.num_scored + 1 + scored_now]
            found[i] = tuple(token_logprobs(logits[at : at + scored_now], targets, [count] * scored_now))
            seq.num_scored += scored_now
        at += scored + sampled
    return found


def event_of(seq: Sequence, told: tuple[TokenLogprobs, ...]) -> TokenEvent:
    """What is known of a prompt that is not computed to its end yet."""
    start = seq.num_scored + 1 - len(told)
    return TokenEvent(seq.request.request_id, prompt_logprobs=told, prompt_logprobs_start=start)
