"""A vocabulary as plain data, for an engine that holds its output to a grammar. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from moe_ray.text.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of each token by its id; None for special ones, which no text consists of, b"" for no token."""
    ids = range(tokenizer.vocab_size)
    return [None if token_id in tokenizer.special_ids else tokenizer.token_bytes(token_id) for token_id in ids]


def token_bytes_of(checkpoint: Path) -> list[bytes | None]:
    """The same, of a checkpoint directory. Raises `CheckpointError` where it has no tokenizer."""
    return token_bytes(Tokenizer(checkpoint))
