"""The token sequences of words that an output must not hold."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.text.tokenizer import Tokenizer


def bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the beginning of a text and behind a space, those twice the same once."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            if ids := tuple(tokenizer.encode(text, add_special_tokens=False)):
                found[ids] = None
    return tuple(found)
