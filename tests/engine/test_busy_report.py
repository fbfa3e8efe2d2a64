"""The line that a busy engine writes every ten seconds, and the last one when it has fallen idle."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import Trunk

from moe_ray.core import EngineStats, Request, SamplingParams
from moe_ray.engine import busy_report
from moe_ray.engine.busy_report import BusyReport, line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    clock, stats = Clock(), EngineStats(num_running=1, kv_blocks_total=10, kv_blocks_free=5, generated_tokens=20)
    report = BusyReport(10, clock)
    assert report.due_in() is None, "an engine that has done nothing has nothing to say"
    with caplog.at_level(logging.INFO, busy_report.__name__):
        report.look(lambda: stats)
        assert report.due_in() == 10
        clock.now += 9
        report.look(lambda: stats)
        assert not caplog.messages
        clock.now += 1
        report.look(lambda: stats)
        assert len(caplog.messages) == 1
        assert "generation 2.0 tokens/s, running 1, waiting 0, KV cache 50.0% used" in caplog.messages[0]
        assert report.due_in() == 10
        stats = replace(stats, num_running=0, kv_blocks_free=10, generated_tokens=40)
        clock.now += 10
        report.look(lambda: stats)
        assert "generation 2.0 tokens/s, running 0, waiting 0, KV cache 0.0% used" in caplog.messages[1]
        assert report.due_in() is None, "that was the last line"
        clock.now += 1000
        stats = replace(stats, num_running=1, generated_tokens=41)
        report.look(lambda: stats)
        clock.now += 10
        report.look(lambda: replace(stats, generated_tokens=140))
    assert "generation 10.0 tokens/s" in caplog.messages[2], "the idle time counts for nothing"
    assert len(caplog.messages) == 3


def test_a_line_tells_of_caches_and_drafts() -> None:
    before = EngineStats(prefix_query_tokens=100, prefix_hit_tokens=100, draft_tokens=10)
    now = EngineStats(prefix_query_tokens=300, prefix_hit_tokens=150, draft_tokens=18, accepted_draft_tokens=6)
    text = line(before, now, 10)
    assert "prefix cache 25.0% hits" in text
    assert text.endswith("75.0% of drafts accepted")


def test_an_idle_engine_wakes_up_to_say_that_it_is_idle(
    readable_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(busy_report, "EVERY_S", 0.3)
    monkeypatch.setattr(BusyReport.__init__, "__defaults__", (0.3, time.monotonic))
    trunk = Trunk(readable_model)
    try:
        with caplog.at_level(logging.INFO, busy_report.__name__):
            request = Request("r", (1, 2, 3), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
            trunk.runtime._loop.submit(request, lambda events: None)
            end = time.monotonic() + 20
            lines: list[str] = []
            quiet_since = time.monotonic()
            while not lines or time.monotonic() - quiet_since < 0.9:  # three times as long as a busy engine is silent
                assert time.monotonic() < end, "an idle engine goes on talking, or has nothing to say"
                time.sleep(0.02)
                now = [record.getMessage() for record in caplog.records if record.name == busy_report.__name__]
                if now != lines:
                    lines, quiet_since = now, time.monotonic()
            assert "running 0" in lines[-1]
    finally:
        trunk.close()
