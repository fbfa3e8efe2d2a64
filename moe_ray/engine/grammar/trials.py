"""The parent's end of the process that tries out grammars (`trial_process`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from typing import IO, Any, Final

from moe_ray.errors import EngineError, InvalidRequest
from moe_ray.sampling import Grammar

MODULE: Final = "moe_ray.engine.grammar.trial_process"


class Trials:
    """One process, begun again after it was lost. Thread-safe."""

    def __init__(self, vocabulary: str) -> None:
        """`vocabulary`: xgrammar's TokenizerInfo as JSON."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._process = _Process(vocabulary)

    def nbytes(self, grammar: Grammar) -> int:
        """Try `grammar` out, and return the memory it takes when compiled.

        Waits for it. Raises `InvalidRequest` where it is wrong or takes too much, `EngineError` without the process.
        """
        with self._lock:
            if self._process.lost:
                self._process = _Process(self._vocabulary)
            answered = self._process.ask(grammar)
        answer = answered.result()
        if "error" in answer:
            raise InvalidRequest(answer["error"], "grammar")
        return int(answer["nbytes"])

    def close(self) -> None:
        """End the process; who waits is told so. Idempotent."""
        with self._lock:
            self._process.close()


class _Process:
    """A running process, and who waits for its answers."""

    def __init__(self, vocabulary: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        self.pid = process.pid
        self._input, output = _pipe(process.stdin), _pipe(process.stdout)
        self._lock = threading.Lock()
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._count = 0
        self.lost = False
        self._end = weakref.finalize(self, _end, process)
        reader = threading.Thread(target=_read, args=(weakref.ref(self), output), name="grammar-trials", daemon=True)
        reader.start()
        self._write(vocabulary)

    def ask(self, grammar: Grammar) -> Future[dict[str, Any]]:
        answered: Future[dict[str, Any]] = Future()
        with self._lock:
            self._count += 1
            number = self._count
            self._asked[number] = answered
        self._write(json.dumps({"id": number, "kind": grammar.kind, "source": grammar.source}))
        if self.lost:
            self.answer(b"")  # the end may have been told before this was asked
        return answered

    def answer(self, line: bytes) -> None:
        """Take in an answer; an empty line: there comes none any more."""
        if line:
            told = json.loads(line)
            with self._lock:
                answered = self._asked.pop(told.pop("id"))
            answered.set_result(told)
            return
        with self._lock:
            self.lost = True
            left, self._asked = list(self._asked.values()), {}
        for answered in left:
            answered.set_exception(EngineError("the process that tries out grammars has ended"))

    def close(self) -> None:
        self._end()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it is gone: the reader tells who waits
            self._input.write(line.encode() + b"\n")
            self._input.flush()


def _read(process: weakref.ref[_Process], output: IO[bytes]) -> None:
    """On a thread of its own: it keeps no process alive that nobody else knows any more."""
    line = b"-"
    while line:
        line = output.readline()
        if (known := process()) is not None:
            known.answer(line)
        del known
    output.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # what it has forked ends at its own limits
    process.wait()
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
