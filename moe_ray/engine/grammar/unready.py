"""The sequences of one engine that wait for their grammar, outside of its scheduler. Used on the engine's thread."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Final

from moe_ray.core import Request, Sequence
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.grammar.state import GrammarState
from moe_ray.errors import EngineError, InvalidRequest, MoeRayError

logger = logging.getLogger(__name__)
FAULT: Final = "the grammar cannot be compiled: an internal fault"


class Unready:
    """They get their `constraint` here, and no others wait for them."""

    def __init__(self, grammars: Grammars | None) -> None:
        """None: requests that have a grammar are refused."""
        self._grammars = grammars
        self._waits: dict[Sequence, Future[GrammarState]] = {}
        self._wake: Callable[[], None] = _nobody_waits

    def __len__(self) -> int:
        """How many wait; callable from any thread."""
        return len(self._waits)

    @property
    def some_ready(self) -> bool:
        """`take` has something to give."""
        return any(ready.done() for ready in self._waits.values())

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` where no grammar can be had. Callable from any thread."""
        if request.sampling.grammar is not None and self._grammars is None:
            raise InvalidRequest("`grammar` needs the model's tokenizer, which this engine was not given", "grammar")

    def add(self, seq: Sequence) -> bool:
        """Compile the grammar of `seq`, if it has one; False if not: then it is ready."""
        if seq.request.sampling.grammar is None:
            return False
        assert self._grammars is not None
        self._waits[seq] = ready = self._grammars.state(seq.request)
        ready.add_done_callback(lambda _: self._wake())
        return True

    def drop(self, seq: Sequence) -> bool:
        """Forget a sequence; False if it does not wait here."""
        ready = self._waits.pop(seq, None)
        if ready is not None:
            ready.cancel()
        return ready is not None

    def take(self) -> Iterator[tuple[Sequence, MoeRayError | None]]:
        """Those that wait no more, with why their grammar is refused, where it is."""
        for seq in [seq for seq, ready in self._waits.items() if ready.done()]:
            ready = self._waits.pop(seq)
            error = ready.exception()
            if error is None:
                seq.constraint = ready.result()
            elif not isinstance(error, MoeRayError):
                logger.error(FAULT, exc_info=error)
                error = EngineError(FAULT)
            yield seq, error

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on any thread, whenever `take` has something more to give."""
        self._wake = wake

    def wait(self) -> None:
        """Return when `take` has something to give."""
        concurrent.futures.wait(self._waits.values(), return_when=concurrent.futures.FIRST_COMPLETED)

    def close(self) -> None:
        """End what compiles. Idempotent."""
        if self._grammars is not None:
            self._grammars.close()


def _nobody_waits() -> None:
    """For an engine that is stepped by who submits."""
