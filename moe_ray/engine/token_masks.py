"""Which tokens a sequence may not choose next: masks over logits, whatever the model thinks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ray.core import SamplingParams


def restricts(params: SamplingParams) -> bool:
    """Whether a sequence has masks of this file."""
    return bool(params.allowed_token_ids or params.bad_words_ids)


def mask_tokens(row: torch.Tensor, params: SamplingParams, output: Sequence[int]) -> None:
    """Mask, in place, what may not follow `output` in one row of logits [V].

    Forbidden words that would leave nothing of the allowed tokens are not masked.
    """
    if params.allowed_token_ids:
        kept = torch.tensor(params.allowed_token_ids, dtype=torch.long, device=row.device)
        values = row[kept]
        row.fill_(-torch.inf)
        row[kept] = values
    forbidden = _forbidden(params.bad_words_ids, output)
    if params.allowed_token_ids and forbidden.issuperset(params.allowed_token_ids):
        return
    row[torch.tensor(list(forbidden), dtype=torch.long, device=row.device)] = -torch.inf


def _forbidden(words: Sequence[tuple[int, ...]], output: Sequence[int]) -> set[int]:
    """The last token of each word whose other tokens end `output`."""
    return {word[-1] for word in words if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]}
