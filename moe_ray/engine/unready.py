"""The sequences of one engine that wait for their grammar, their adapter or a disk, outside of its scheduler.

Used on the engine's thread.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.core import Request, Sequence
from moe_ray.engine.adapter_shelf import AdapterShelf
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.grammar.state import GrammarState
from moe_ray.errors import EngineError, InvalidRequest, MoeRayError

logger = logging.getLogger(__name__)
FAULT: Final = "the grammar or the adapter of the request cannot be used: an internal fault"


@dataclass(frozen=True, slots=True)
class _Wait:
    """What one sequence waits for."""

    grammar: Future[GrammarState] | None
    adapter: Future[None] | None
    blocks: Future[Any] | None
    """KV blocks that are being read."""

    @property
    def futures(self) -> list[Future[Any]]:
        return [each for each in (self.grammar, self.adapter, self.blocks) if each is not None]

    @property
    def over(self) -> bool:
        return all(each.done() for each in self.futures)


class Unready:
    """They get their `constraint` here, and no others wait for them."""

    def __init__(
        self, grammars: Grammars | None, adapters: AdapterShelf, fetch: Callable[[Sequence], Future[Any] | None]
    ) -> None:
        """`grammars` None: requests that have a grammar are refused. `fetch`: begins to read a sequence's KV blocks."""
        self._fetch = fetch
        self._grammars = grammars
        self._adapters = adapters
        self._waits: dict[Sequence, _Wait] = {}
        self._wake: Callable[[], None] = _nobody_waits

    def __len__(self) -> int:
        """How many wait; callable from any thread."""
        return len(self._waits)

    @property
    def some_ready(self) -> bool:
        """`take` has something to give, or an adapter is there to be settled."""
        return any(wait.over for wait in self._waits.values()) or any(each.done() for each in self._adapters.arriving)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` where no grammar can be had. Callable from any thread."""
        if request.sampling.grammar is not None and self._grammars is None:
            raise InvalidRequest("`grammar` needs the model's tokenizer, which this engine was not given", "grammar")

    def add(self, seq: Sequence) -> bool:
        """Have the grammar, the adapter and the blocks of `seq` made ready; False if it need not wait for them.

        From here on the adapter counts as used, until `AdapterShelf.release`.
        """
        grammar = None
        if seq.request.sampling.grammar is not None:
            assert self._grammars is not None
            grammar = self._grammars.state(seq.request)
        adapter = None if seq.request.adapter is None else self._adapters.use(seq.request.adapter)
        wait = _Wait(grammar, adapter, self._fetch(seq))
        if not wait.futures:
            return False
        self._waits[seq] = wait
        for each in (wait.grammar, wait.blocks):
            if each is not None:
                each.add_done_callback(lambda _: self._wake())
        return True

    def drop(self, seq: Sequence) -> bool:
        """Forget a sequence; False if it does not wait here."""
        wait = self._waits.pop(seq, None)
        if wait is not None and wait.grammar is not None:
            wait.grammar.cancel()
        return wait is not None

    def take(self) -> Iterator[tuple[Sequence, MoeRayError | None]]:
        """Those that wait no more, with why their grammar or adapter cannot be had, where that is so.

        Adapters that have arrived are put in their place.
        """
        self._adapters.settle()
        for seq in [seq for seq, wait in self._waits.items() if wait.over]:
            wait = self._waits.pop(seq)
            error = next((found for each in wait.futures if (found := each.exception()) is not None), None)
            if error is None:
                if wait.grammar is not None:
                    seq.constraint = wait.grammar.result()
            elif not isinstance(error, MoeRayError):
                logger.error(FAULT, exc_info=error)
                error = EngineError(FAULT)
            yield seq, error

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on any thread, whenever `take` may have something more to give."""
        self._wake = wake
        self._adapters.wake_with(wake)

    def wait(self) -> None:
        """Return when `take` may have something to give."""
        waited = [each for wait in self._waits.values() for each in (wait.grammar, wait.blocks) if each is not None]
        futures: list[Future[Any]] = [*self._adapters.arriving, *(each for each in waited if not each.done())]
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)

    def close(self) -> None:
        """End what compiles and loads. Idempotent."""
        self._adapters.close()
        if self._grammars is not None:
            self._grammars.close()


def _nobody_waits() -> None:
    """For an engine that is stepped by who submits."""
