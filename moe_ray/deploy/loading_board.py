"""How far each actor has loaded, told to whoever started it. Nobody listening is fine."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from moe_ray.model.checkpoint import Progress

NAME, NAMESPACE = "moe_ray_loading", "moe_ray"


class LoadingBoard:
    """A Ray actor that keeps the last (bytes read, bytes to read) of every actor that loads; `serve` draws it."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, int]] = {}

    def report(self, who: str, done: int, total: int) -> None:
        self._rows[who] = (done, total)

    def rows(self) -> dict[str, tuple[int, int]]:
        return dict(self._rows)


def reporter(who: str, every_s: float = 0.2) -> Progress:
    """Return a progress callback that reports to the cluster's `LoadingBoard`, or does nothing if there is none."""
    try:
        board = ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return lambda done, total: None
    last, lock = 0.0, threading.Lock()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        with lock:
            if done < total and now - last < every_s:
                return
            last = now
        board.report.remote(who, done, total)

    return report
