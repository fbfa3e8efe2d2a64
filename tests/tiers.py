"""Two tiers of tests. Slow is what needs Ray, a served model or the demo model in transformers, or is marked `slow`.

A test is marked by its fixtures, so that a new test of a served model is slow without another word. What starts Ray
or a server by itself, or takes more than about two seconds of a core, carries `@pytest.mark.slow`. A fast test that
asks for a slow fixture while it runs, or starts Ray in this process, fails.

Slow tests of `APART` compute and no more: several run side by side. The others run one at a time.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW_FIXTURES = frozenset({"ray_cluster", "demo_reference"})
APART = frozenset({"model", "native", "convert", "quality", "engine"})
"""Rooms whose slow tests need neither Ray nor a server."""
FAST_TIMEOUT_S = 120
"""A fast test that has taken this long hangs. What is slow has the limit of pyproject.toml: so does a fast test that
may be the one that builds the demo model."""


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


def mark(item: pytest.Item) -> None:
    """Mark what is slow by its fixtures, and limit the time of what is fast."""
    if SLOW_FIXTURES & fixtures(item):
        item.add_marker(pytest.mark.slow)
    elif is_slow(item) and item.path.relative_to(TESTS).parts[0] in APART:
        item.add_marker(pytest.mark.apart)
    elif not is_slow(item) and "demo_model" not in fixtures(item) and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(FAST_TIMEOUT_S))


def order(item: pytest.Item) -> int:
    """Fast tests first; then what starts a Ray of its own, while no application of the session fills the memory."""
    if not is_slow(item):
        return 0
    return 2 if SLOW_FIXTURES & fixtures(item) else 1


def hide_instruction_sets() -> None:
    """Torch computes here and in what is started from here, in its code for any x86-64; call it before torch comes."""
    from moe_ray.native import build

    os.environ |= {"MOE_RAY_MODEL__KERNELS": "torch", "ATEN_CPU_CAPABILITY": "default"}
    build.cpu_flags = frozenset[str]
