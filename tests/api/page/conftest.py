"""One browser, and one server of the page over a small random model, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import open_browser
from house_in_process import HouseInProcess, page_server
from in_process import Trunk
from playwright.sync_api import Browser

from moe_ray.api.service import HttpOptions


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def trunk(kernel_model: Path) -> Iterator[Trunk]:
    """It takes two requests at a time; a third is refused."""
    running = Trunk(kernel_model, max_waiting=1, max_num_seqs=1)
    yield running
    running.close()


@pytest.fixture(scope="module")
def house(kernel_model: Path, trunk: Trunk) -> HouseInProcess:
    return HouseInProcess(kernel_model, trunk)


@pytest.fixture(scope="module")
def url(kernel_model: Path, trunk: Trunk, house: HouseInProcess) -> Iterator[str]:
    # What fails before the first token is an HTTP status here, however slow the machine is.
    options = HttpOptions(headers_within_s=30)
    with page_server(kernel_model, trunk, options, house) as served:
        yield served


@pytest.fixture
def slow(trunk: Trunk) -> Iterator[Trunk]:
    """The trunk, which a test may slow down or break."""
    yield trunk
    trunk.engine.pause_s, trunk.engine.error = 0.0, None
