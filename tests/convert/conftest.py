"""What the tests of quantisation share: a small model, and a text to calibrate it on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_mixtral import TOKENIZER, save_random_mixtral


@pytest.fixture(scope="session")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with the demo model's tokenizer, of which it has all ids."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("float") / "model",
        seed=3,
        dtype=torch.bfloat16,
        like=demo_model,
        files=TOKENIZER,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The miller's daughter counted nineteen sacks, and then, to be sure, counted them again. " * 20)
    return path
