"""Runs an engine on a thread of its own: thread-safe requests in, one list of events per step and listener out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_ray.core import AdapterRef, EngineStats, Request, TokenEvent
from moe_ray.engine.busy_report import BusyReport
from moe_ray.engine.engine import Engine
from moe_ray.engine.step_times import StepTimes
from moe_ray.errors import EngineError, MoeRayError

logger = logging.getLogger(__name__)

Sink = Callable[[list[TokenEvent]], None]
"""Takes everything that one step produced for one listener. Called on the engine's thread: must not block."""


@dataclass(frozen=True, slots=True)
class _Inbox:
    submits: list[tuple[Request, Sink, float]]
    """With the moment at which each came."""
    aborts: list[str]
    gone: list[Sink]
    load: list[AdapterRef] = field(default_factory=list)
    """Adapters that requests may come for."""
    unload: list[int] = field(default_factory=list)
    """Ids of adapters that they no longer come for."""


class EngineLoop:
    """Owns the engine. All methods are thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sink_of: dict[str, Sink] = {}
        self._report = BusyReport()
        self._condition = threading.Condition()
        self._inbox = _Inbox([], [], [])
        self._closed = False
        self._ended: MoeRayError | None = None
        """What every request is told once the thread serves none any more."""
        self.failure: Exception | None = None
        """What stopped the engine, once something has."""
        engine.wake_with(self._notify)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its events, errors included, go to `sink`.

        What can be refused at once is, on this thread: a step of the engine may last for seconds.
        """
        refused: MoeRayError | None = None
        try:
            self._engine.check(request)
        except MoeRayError as error:
            refused = error
        with self._condition:
            refused = self._ended or refused or self._engine.overload(len(self._inbox.submits))
            if refused is None:
                self._inbox.submits.append((request, sink, time.perf_counter()))
                self._condition.notify()
        if refused is not None:
            sink([TokenEvent(request.request_id, error=refused)])

    def abort(self, request_id: str) -> None:
        """Drop a request; no event follows once the engine has seen this."""
        with self._condition:
            self._inbox.aborts.append(request_id)
            self._condition.notify()

    def drop(self, sink: Sink) -> None:
        """Drop every request of a listener that is gone."""
        with self._condition:
            self._inbox.gone.append(sink)
            self._condition.notify()

    def load_adapter(self, adapter: AdapterRef) -> None:
        """Begin to load an adapter before the first request for it comes."""
        with self._condition:
            self._inbox.load.append(adapter)
            self._condition.notify()

    def drop_adapter(self, adapter_id: int) -> None:
        """Forget an adapter once the last request for it has ended."""
        with self._condition:
            self._inbox.unload.append(adapter_id)
            self._condition.notify()

    @property
    def times(self) -> StepTimes:
        """Of the engine's steps."""
        return self._engine.times

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        """Stop after the current step; live requests end in `EngineError`. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(timeout=60)

    def _notify(self) -> None:
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._hand_out(self._engine.step())
                self._report.look(self._engine.stats)
            self._fail_all(EngineError("the trunk is shutting down"))
        except Exception as error:
            logger.exception("the engine stopped")
            self.failure = error
            self._fail_all(EngineError(f"the engine stopped: {type(error).__name__}"))
        finally:
            self._engine.close()

    def _take_in(self) -> bool:
        """Wait for work and take in what was asked; False when closed."""
        with self._condition:
            while not self._condition.wait_for(self._is_asked, self._report.due_in()):
                self._report.look(self._engine.stats)
            if self._closed:
                return False  # what came last is told so by _fail_all
            inbox, self._inbox = self._inbox, _Inbox([], [], [])
        for adapter in inbox.load:
            self._engine.load_adapter(adapter)
        for adapter_id in inbox.unload:
            self._engine.drop_adapter(adapter_id)
        for request, sink, arrived_s in inbox.submits:
            try:
                self._engine.submit(request, arrived_s)
                self._sink_of[request.request_id] = sink
            except MoeRayError as error:
                sink([TokenEvent(request.request_id, error=error)])
        gone = {id(sink) for sink in inbox.gone}
        left = [request_id for request_id, sink in self._sink_of.items() if id(sink) in gone] if gone else []
        for request_id in inbox.aborts + left:
            self._engine.abort(request_id)
            self._sink_of.pop(request_id, None)
        return True

    def _is_asked(self) -> bool:
        mail = self._inbox
        asked = mail.submits or mail.aborts or mail.gone or mail.load or mail.unload
        return bool(self._closed or self._engine.has_work or asked)

    def _hand_out(self, events: list[TokenEvent]) -> None:
        by_sink: dict[int, tuple[Sink, list[TokenEvent]]] = {}
        for event in events:
            sink = self._sink_of[event.request_id]
            by_sink.setdefault(id(sink), (sink, []))[1].append(event)
            if event.last:
                del self._sink_of[event.request_id]
        for sink, own in by_sink.values():
            sink(own)

    def _fail_all(self, error: MoeRayError) -> None:
        with self._condition:
            self._closed, self._ended = True, error
            waiting, self._inbox = self._inbox.submits, _Inbox([], [], [])
        for request, sink, _ in waiting:
            self._sink_of[request.request_id] = sink
        self._hand_out([TokenEvent(request_id, error=error) for request_id in list(self._sink_of)])
