"""What a step's logits become: tokens, and what is told of them and of prompts."""

from __future__ import annotations

import torch

from moe_ray.core import Batch, TokenLogprobs
from moe_ray.engine import prompt_logprobs
from moe_ray.engine.batches import sampled_sequences
from moe_ray.engine.grammar.state import grammar_masks
from moe_ray.engine.host_copies import Readback
from moe_ray.engine.sampler import Sampled, Sampling


def step_tokens(
    batch: Batch, logits: torch.Tensor, eos_token_ids: frozenset[int]
) -> tuple[Sampled, dict[int, tuple[TokenLogprobs, ...]]]:
    """Tokens of the rows that are sampled, and log-probabilities of prompts by the number of their sequence.

    logits [sum(num_logits), V]. Waits for their device once.
    """
    readback = Readback(logits.device)
    scoring = prompt_logprobs.start(batch, logits, readback)
    sequences, drafts = sampled_sequences(batch)
    masks = grammar_masks(batch, logits.shape[-1])
    rows = prompt_logprobs.sampled_rows(batch, logits)
    sampling = Sampling(rows, sequences, readback, eos_token_ids, drafts, masks)
    readback.wait()
    return sampling.take(), prompt_logprobs.take(scoring)
