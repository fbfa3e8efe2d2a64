"""Log-probabilities of prompt tokens, from the logits of a step."""

from __future__ import annotations

import torch

from moe_ray.core import Batch, Sequence, TokenEvent, TokenLogprobs
from moe_ray.engine.host_copies import Readback, Sent, Upload
from moe_ray.engine.token_logprobs import PendingLogprobs


def sampled_rows(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Those rows of a batch's logits that are sampled, [sum(num_sampled), V]."""
    if not batch.num_scored:
        return logits
    rows, at = list[int](), 0
    for scored, sampled in zip(batch.num_scored, batch.num_sampled, strict=True):
        rows += range(at + scored, at + scored + sampled)
        at += scored + sampled
    upload = Upload()
    sent = upload.ints(rows)
    upload.send(logits.device)
    return logits[sent.tensor]


def start(batch: Batch, logits: torch.Tensor, readback: Readback) -> dict[int, PendingLogprobs]:
    """What a step's logits say of prompt tokens that were not told yet; number of the sequence in the batch → them.

    They count as told with that: `num_scored` of each sequence grows.
    """
    found: dict[int, PendingLogprobs] = {}
    if not batch.num_scored:
        return found
    upload, parts = Upload(), list[tuple[int, int, int, Sent]]()
    at = 0
    for i, (scored, sampled) in enumerate(zip(batch.num_scored, batch.num_sampled, strict=True)):
        if scored:
            seq = batch.sequences[i]
            # A replayed sequence's chunk may go on behind the prompt.
            count = min(scored, seq.num_prompt - 1 - seq.num_scored)
            targets = seq.token_ids[seq.num_scored + 1 : seq.num_scored + 1 + count]
            parts.append((i, at, count, upload.ints(targets)))
            seq.num_scored += count
        at += scored + sampled
    upload.send(logits.device)
    for i, first, count, sent in parts:
        most = batch.sequences[i].request.sampling.prompt_logprobs or 0
        found[i] = PendingLogprobs(logits[first : first + count], sent.tensor, [most] * count, readback)
    return found


def take(pending: dict[int, PendingLogprobs]) -> dict[int, tuple[TokenLogprobs, ...]]:
    """What was started, once the readback was waited for."""
    return {i: tuple(told for told in each.take() if told is not None) for i, each in pending.items()}


def event_of(seq: Sequence, told: tuple[TokenLogprobs, ...]) -> TokenEvent:
    """What is known of a prompt that is not computed to its end yet."""
    start = seq.num_scored + 1 - len(told)
    return TokenEvent(seq.request.request_id, prompt_logprobs=told, prompt_logprobs_start=start)
