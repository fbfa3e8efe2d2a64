"""Random Mixtrals of any shape, as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CHAT = (*TOKENIZER, "chat_template.jinja")


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
