"""A trunk in this process, for gateways in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Trunk, served_beside
from random_mixtral import save_random_mixtral


@pytest.fixture(scope="module")
def trunk(readable_model: Path) -> Iterator[Trunk]:
    """One for all tests of a file; they leave it idle and at full speed."""
    running = Trunk(readable_model, max_waiting=200)
    yield running
    running.close()


@pytest.fixture(scope="session")
def chat_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two layers with the demo model's whole vocabulary and chat template, and a long context."""
    return save_random_mixtral(
        tmp_path_factory.mktemp("for-chats") / "model",
        seed=3,
        like=demo_model,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def chat_trunk(chat_model: Path) -> Iterator[Trunk]:
    """One of `chat_model` for all tests; they leave it idle and at full speed."""
    running = Trunk(chat_model, max_waiting=200)
    yield running
    running.close()


@pytest.fixture(scope="session")
def text_trunk(kernel_model: Path) -> Iterator[Trunk]:
    """One that has a token for every text, for all files; they leave it idle and at full speed."""
    running = Trunk(kernel_model)
    yield running
    running.close()


@pytest.fixture(scope="session")
def text_url(text_trunk: Trunk, kernel_model: Path) -> Iterator[str]:
    """Where a gateway over it listens, on a thread of its own."""
    with served_beside(kernel_model, [text_trunk.info]) as url:
        yield url
