"""The compiled grammars of one engine: made off its thread, kept within bounds, given out as states of sequences."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from moe_ray.core import Request
from moe_ray.engine.grammar.state import CompiledSource, GrammarState
from moe_ray.engine.grammar.trials import Trials
from moe_ray.errors import CheckpointError, EngineError, InvalidRequest, Overloaded
from moe_ray.sampling import Grammar

if TYPE_CHECKING:
    from xgrammar import GrammarCompiler

NICENESS: Final = 5
"""Of the threads that compile: tokens come first."""
COMPILE_THREADS: Final = 4
"""Grammars that are compiled at a time: most of the time they wait for the process that tries them out."""
MOST_KEPT: Final = 256
MOST_KEPT_BYTES: Final = 128 * 2**20
MOST_LIVE_BYTES: Final = 512 * 2**20
"""Kept or in use by a request."""

TokenBytes = Callable[[], list[bytes | None]]
"""Reads the vocabulary: the bytes of each token by its id, None for special ones, b"" for ids without a token."""


@dataclass(frozen=True, slots=True)
class _Compiler:
    """What is made with the first grammar, and serves all."""

    here: GrammarCompiler
    trials: Trials


@dataclass(slots=True, eq=False)
class _Kept:
    """A grammar of the cache."""

    outcome: CompiledSource | BaseException | None = None
    """None while it is being compiled."""
    waiting: list[tuple[Request, Future[GrammarState]]] = field(default_factory=list)
    """Who waits for that."""

    @property
    def nbytes(self) -> int:
        return self.outcome.nbytes if isinstance(self.outcome, CompiledSource) else 0


class Grammars:
    """Compiles, and keeps what was used last. Thread-safe; never blocks its caller."""

    def __init__(self, token_bytes: TokenBytes, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        """`vocab_size`: of the model. `token_bytes` is called when the first grammar comes, on a thread of ours."""
        self._token_bytes, self._vocab_size, self._end = token_bytes, vocab_size, end_token_ids
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._compiler: _Compiler | None = None
        self._kept: OrderedDict[Grammar, _Kept] = OrderedDict()
        self._live: weakref.WeakSet[CompiledSource] = weakref.WeakSet()
        self._compiling = ThreadPoolExecutor(COMPILE_THREADS, "grammar-compile", initializer=_be_nice)
        self._stating = ThreadPoolExecutor(1, "grammar-state")

    @property
    def num_kept(self) -> int:
        """Grammars in the cache, those that were refused or are being compiled included."""
        return len(self._kept)

    @property
    def live_bytes(self) -> int:
        """Memory of all compiled grammars, kept or in use."""
        return sum(compiled.nbytes for compiled in list(self._live))

    def state(self, request: Request) -> Future[GrammarState]:
        """Where `request` is in its grammar, once that is compiled.

        The future's errors: `InvalidRequest` for a grammar or an output that is wrong, `Overloaded`, `EngineError`.
        """
        grammar = request.sampling.grammar
        assert grammar is not None
        stated: Future[GrammarState] = Future()
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is None:
                kept = self._kept[grammar] = _Kept()
                self._compiling.submit(self._compile, grammar, kept)
                self._shrink()
            self._kept.move_to_end(grammar)
            if kept.outcome is None:
                kept.waiting.append((request, stated))
                return stated
        self._begin(request, kept.outcome, stated)
        return stated

    def close(self) -> None:
        """End the threads and the process. Idempotent."""
        with self._lock:
            if self._compiler is not None:
                self._compiler.trials.close()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._stating.shutdown(wait=False, cancel_futures=True)

    def _begin(self, request: Request, outcome: CompiledSource | BaseException, stated: Future[GrammarState]) -> None:
        """Not on the caller's thread: it may be the engine's, and the output of a replayed request be long."""
        try:
            self._stating.submit(self._state, request, outcome, stated)
        except RuntimeError:
            stated.set_exception(EngineError("the engine was closed"))

    def _state(self, request: Request, outcome: CompiledSource | BaseException, stated: Future[GrammarState]) -> None:
        if not stated.set_running_or_notify_cancel():
            return
        ends = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else self._end)}
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            stated.set_result(GrammarState(outcome, sorted(ends), request.output_token_ids))
        except BaseException as error:  # noqa: BLE001 - who waits for the future gets it
            stated.set_exception(error)

    def _compile(self, grammar: Grammar, kept: _Kept) -> None:
        outcome: CompiledSource | BaseException
        try:
            outcome = self._compiled(grammar)
        except BaseException as error:  # noqa: BLE001 - who waits for the grammar gets it
            outcome = error
        with self._lock:
            kept.outcome = outcome
            waiting, kept.waiting = kept.waiting, []
            # What is wrong with a grammar is kept, so that it is not tried again; other failures may pass.
            if not isinstance(outcome, CompiledSource | InvalidRequest) and self._kept.get(grammar) is kept:
                del self._kept[grammar]
        for request, stated in waiting:
            self._begin(request, outcome, stated)

    def _compiled(self, grammar: Grammar) -> CompiledSource:
        from moe_ray.engine.grammar.source import compile_source

        # On the thread that is not nice: what it starts would have its niceness.
        compiler = self._stating.submit(self._made).result()
        nbytes = compiler.trials.nbytes(grammar)
        with self._lock:
            self._shrink(nbytes)
            if self.live_bytes + nbytes > MOST_LIVE_BYTES:
                raise Overloaded("the grammars of running and waiting requests take all the memory that is for them")
        compiled = CompiledSource(compile_source(compiler.here, grammar), self._vocab_size, nbytes)
        with self._lock:
            self._live.add(compiled)
        return compiled

    def _made(self) -> _Compiler:
        """The compiler, made on the first call. Raises `InvalidRequest` where the vocabulary cannot be read."""
        with self._making:
            if self._compiler is None:
                from moe_ray.engine.grammar.source import grammar_compiler, tokenizer_info

                try:
                    info = tokenizer_info(self._token_bytes(), self._vocab_size, self._end)
                except CheckpointError as error:
                    raise InvalidRequest(f"`grammar` needs the model's tokenizer: {error}", "grammar") from error
                self._compiler = _Compiler(grammar_compiler(info), Trials(info.serialize_json()))
            return self._compiler

    def _shrink(self, coming: int = 0) -> None:
        """Forget those that were used longest ago, as far as they are too many or too large. With the lock held."""
        nbytes = coming + sum(kept.nbytes for kept in self._kept.values())
        for grammar, kept in list(self._kept.items()):
            if len(self._kept) <= MOST_KEPT and nbytes <= MOST_KEPT_BYTES:
                return
            if kept.outcome is not None:
                nbytes -= kept.nbytes
                del self._kept[grammar]


def _be_nice() -> None:
    """Let the engine's thread go first; on Linux each thread has a niceness of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
