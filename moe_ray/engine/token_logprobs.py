"""Log-probabilities of tokens from rows of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ray.core import TokenLogprobs


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of token_ids[i] under row i of logits [R, V], of the counts[i] most likely ones, and its rank among all."""
    if not token_ids:
        return []
    table = logits.log_softmax(-1)
    chosen = table.gather(1, torch.tensor([token_ids], device=logits.device).T)
    ranks = (table > chosen).sum(-1) + 1
    values, ids = table.topk(max(1, *counts), dim=-1)
    found = []
    for i, (token, logprob, rank) in enumerate(zip(token_ids, chosen[:, 0].tolist(), ranks.tolist(), strict=True)):
        top = tuple(zip(ids[i, : counts[i]].tolist(), values[i, : counts[i]].tolist(), strict=True))
        found.append(TokenLogprobs(token, logprob, top, rank))
    return found
