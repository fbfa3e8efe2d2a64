"""Whether two checkpoints mean the same by their token ids. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from moe_ray.errors import ConfigError
from moe_ray.model.end_tokens import tokenizer_file
from moe_ray.text.loading import load_tokenizer


def check_same_vocabulary(draft: Path, target: Path) -> None:
    """Raise `ConfigError` naming the first token id by which a draft model's directory means another token.

    A draft model without a tokenizer is taken at its word, and so is a target without one. Raises `CheckpointError`
    where one cannot be read.
    """
    files = tokenizer_file(draft), tokenizer_file(target)
    if files[0] is None or files[1] is None or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = ({i: token for token, i in load_tokenizer(file).get_vocab().items()} for file in files if file)
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise ConfigError(
                f"engine.draft_model {draft}: its token {token_id} is {ours.get(token_id)!r}, the model's is "
                f"{theirs.get(token_id)!r}: a draft model must have the model's own vocabulary"
            )
