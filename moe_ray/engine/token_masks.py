"""Which tokens a sequence may not choose next, whatever the model thinks of them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.core import SamplingParams


def forbidden(params: SamplingParams, output: Sequence[int]) -> set[int]:
    """Tokens that would complete a forbidden word behind `output`; none where nothing allowed would be left."""
    words = params.bad_words_ids
    found = {word[-1] for word in words if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]}
    return set() if _leaves_nothing(params, found) else found


def too_early(params: SamplingParams, output: Sequence[int], eos_token_ids: frozenset[int]) -> set[int]:
    """Tokens that end the sequence, while it is shorter than it must be; none where nothing would be left."""
    if len(output) >= params.min_tokens:
        return set()
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return set() if _leaves_nothing(params, stops) else stops


def _leaves_nothing(params: SamplingParams, masked: set[int]) -> bool:
    return bool(params.allowed_token_ids) and masked.issuperset(params.allowed_token_ids)
