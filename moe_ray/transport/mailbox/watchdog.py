"""Ends what a device's stream waits for when the other process will not write it any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moe_ray.transport.mailbox.memory import FlagPage

LOOK_S: Final = 0.002
"""How often waits are looked at, while there are any."""
CLOSED: Final = "the replica closed"


@dataclass(slots=True, eq=False)
class Wait:
    """One wait of a stream for a slot's word."""

    page: FlagPage
    slot: int
    generation: int
    deadline: float
    """Monotonic seconds."""
    is_gone: Callable[[], bool]
    """Whether the process that is to write the word is gone."""
    released: str = ""
    """Why the watchdog has written the word itself; empty: it has not."""


class Watchdog:
    """Looks at waits from a thread of its own, and ends each of them by its deadline. `close` it."""

    def __init__(self) -> None:
        self._waits: list[Wait] = []
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="mailbox-watchdog", daemon=True).start()

    def guard(self, wait: Wait) -> None:
        """Look at a wait until its word is written; call this before the stream begins to wait."""
        with self._changed:
            if self._closed:
                _release(wait, CLOSED)
            self._waits.append(wait)
            self._changed.notify()

    def close(self) -> None:
        """Release every wait, and look at none any more. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waits and not self._closed:
                    self._changed.wait()
                if self._closed:
                    for wait in self._waits:
                        _release(wait, CLOSED)
                    return
                self._waits = [wait for wait in self._waits if not _ended(wait)]
            time.sleep(LOOK_S)


def _ended(wait: Wait) -> bool:
    if wait.page.reached(wait.slot, wait.generation):
        return True
    if wait.is_gone():
        _release(wait, "the trunk is gone")
    elif time.monotonic() >= wait.deadline:
        _release(wait, "they were not there in time")
    return bool(wait.released)


def _release(wait: Wait, why: str) -> None:
    if not wait.page.reached(wait.slot, wait.generation):
        wait.released = why  # before the word: who goes on must see it
        wait.page.store(wait.slot, wait.generation)
