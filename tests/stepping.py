"""An engine, stepped until all its requests have ended; bookkeeping is looked at after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_ray.core import Request, TokenEvent
from moe_ray.engine.engine import Engine


def events_of(
    engine: Engine,
    requests: Sequence[Request],
    pauses: Sequence[int] = (),
    before_step: Callable[[int], None] = lambda _: None,
) -> dict[str, list[TokenEvent]]:
    """All events of the requests, by their ids. `pauses`: steps before each comes; without them they come together."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    coming = list(zip(requests, pauses or [0] * len(requests), strict=True))
    due = coming[0][1] if coming else 0
    step = 0
    while any(not own or not own[-1].last for own in events.values()):
        while coming and step >= due:
            engine.submit(coming.pop(0)[0])
            due = step + coming[0][1] if coming else 0
        before_step(step)
        if not coming:
            engine.wait()
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
        step += 1
    return events
