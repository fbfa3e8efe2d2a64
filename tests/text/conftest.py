"""The tokenizers that the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_forms import sentencepiece_model

from moe_ray.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral's tokenizer.model alone."""
    return sentencepiece_model(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def mixtral(mixtral_dir: Path) -> Tokenizer:
    return Tokenizer(mixtral_dir)


@pytest.fixture(scope="session")
def smol(demo_model: Path) -> Tokenizer:
    """The demo model's byte-level tokenizer.json."""
    return Tokenizer(demo_model)
