"""A trunk in this process, for gateways in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Trunk


@pytest.fixture(scope="module")
def trunk(readable_model: Path) -> Iterator[Trunk]:
    """One for all tests of a file; they leave it idle and at full speed."""
    running = Trunk(readable_model, max_waiting=200)
    yield running
    running.close()
