"""The tools that check what is in cluster/."""

from __future__ import annotations

from pathlib import Path

import pytest
from debian_prometheus import prometheus_tool


@pytest.fixture(scope="session")
def promtool() -> Path:
    """promtool, where it can be had."""
    return prometheus_tool("promtool")
