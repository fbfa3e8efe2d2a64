"""A trunk in this process, for gateways in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Trunk
from in_thread import served_at


@pytest.fixture(scope="module")
def trunk(readable_model: Path) -> Iterator[Trunk]:
    """One for all tests of a file; they leave it idle and at full speed."""
    running = Trunk(readable_model, max_waiting=200)
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
    with served_at(kernel_model, [text_trunk.info]) as url:
        yield url
