"""The token sequences of words that an output must not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_ray.sampling import SamplingParams
from moe_ray.text.tokenizer import Tokenizer


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the beginning of a text and behind a space, those twice the same once."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(text, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)


def with_bad_words(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Sampling parameters whose `bad_words`, if there are any, are token ids, too."""
    if not sampling.bad_words:
        return sampling
    return replace(sampling, bad_words_ids=bad_words_ids(sampling.bad_words, tokenizer))
