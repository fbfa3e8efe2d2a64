"""A question asked again and again while something changes underneath."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Asking:
    """Asks on a thread, one after the other; `answers` are what came, and the first failure is raised at the end."""

    def __init__(self, ask: Callable[[], str]) -> None:
        self.answers: list[str] = []
        self._ask, self._stop = ask, threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.answers.append(self._ask())
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            self._failure = error

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
