"""Replicas set by hand under a stream: they come and go, no token changes, and nobody else is restarted."""

from __future__ import annotations

import io

import pytest
from asking import Asking
from rich.console import Console
from served import Served, by_hand, complete, eventually, statuses

from moe_ray.deploy.scale_by_hand import scale
from moe_ray.errors import ConfigError, NotReady

EXPERT = 2


def pids(served: Served, *, without: str = "") -> dict[str, set[int]]:
    names = [name for name in ("Gateway", "Trunk", *(f"Expert{e}" for e in range(8))) if name != without]
    return {name: {status["pid"] for status in statuses(served, name)} for name in names}


def test_one_two_one_under_a_stream(served_random: Served) -> None:
    name, prompt = f"Expert{EXPERT}", list(range(3, 40))
    undisturbed = complete(served_random, prompt)
    others, (first,) = pids(served_random, without=name), statuses(served_random, name)

    def linked() -> list[str]:
        (trunk,) = statuses(served_random, "Trunk")
        return [replica for replica in trunk["links"] if f"#{name}#" in replica]

    with Asking(lambda: complete(served_random, prompt)) as streams:
        assert name in by_hand(served_random, [EXPERT], 2)
        eventually(lambda: len(linked()) == 2, 2.0)  # long before `refresh_s`: the trunk heard of it
        both = statuses(served_random, name)
        assert len(both) == 2
        assert first["pid"] in {status["pid"] for status in both}
        eventually(lambda: all(status["calls"] > 0 for status in statuses(served_random, name)))
        by_hand(served_random, [EXPERT], None)
        (left,) = statuses(served_random, name)
        assert linked() == [left["replica_id"]]
    assert len(streams.answers) >= 2
    assert set(streams.answers) == {undisturbed}
    assert pids(served_random, without=name) == others


def test_what_cannot_be_asked_for(served_random: Served) -> None:
    with pytest.raises(ConfigError, match="no expert 8: this model has 0 to 7"):
        by_hand(served_random, [0, 8], 2)
    with pytest.raises(ConfigError, match=r"65 replicas: must be 1 to 64 .*max_replicas_by_hand"):
        by_hand(served_random, [0], 65)
    with pytest.raises(NotReady, match="runs no application 'elsewhere'"):
        scale([0], 2, Console(file=io.StringIO()), application="elsewhere")
    assert len(statuses(served_random, "Expert0")) == 1
