"""Random Mixtrals of any shape, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CHAT = (*TOKENIZER, "chat_template.jinja")


SMALL: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A shape whose engines answer in a moment."""


def save_random_mixtral(
    directory: Path,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    like: Path | None = None,
    files: Sequence[str] = CHAT,
    **shape: Any,
) -> Path:
    """Write a random Mixtral into `directory`, and return that. `shape` is of transformers' MixtralConfig.

    `like`: a checkpoint whose tokenizer it gets (its `files`), with all ids of it unless `shape` says otherwise.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    if like is not None:
        shape.setdefault("vocab_size", json.loads((like / "config.json").read_text())["vocab_size"])
    model = MixtralForCausalLM(MixtralConfig(**shape))
    model.to(dtype or torch.float32).save_pretrained(directory)
    for name in files if like is not None else ():
        shutil.copy(like / name, directory / name)
    return directory
