"""The time line of a start: stretches that add up."""

from __future__ import annotations

import time

import pytest

from moe_ray.commands.timeline import Timeline


def test_stretches_follow_one_another() -> None:
    timeline = Timeline()
    time.sleep(0.06)
    timeline.mark("Ray")
    timeline.mark("links")
    assert [what for what, _ in timeline.stretches] == ["Ray", "links"]
    assert timeline.stretches[0][1] >= 0.06 > timeline.stretches[1][1]
    assert timeline.total == pytest.approx(sum(seconds for _, seconds in timeline.stretches))
    assert str(timeline) == "Ray 0.1 · links 0.0 s"
