"""A process that tries out grammars, so that what a hostile one costs is spent there. `python -m` this, see `Trials`.

It reads the vocabulary once and forks for each grammar: the fork compiles it with little time, memory and stack, and
tells what it cost. What passed is compiled again where it is needed, which costs what is known to be little.

Lines of JSON: first xgrammar's TokenizerInfo, then {"id": 1, "kind": "regex", "source": "a|b"}; answers are
{"id": 1, "nbytes": 1112} or {"id": 1, "error": "…"}.
"""

from __future__ import annotations

import json
import os
import re
import resource
import selectors
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xgrammar import GrammarCompiler, TokenizerInfo

from moe_ray.engine.grammar.source import check_schemas, compile_source, grammar_compiler, told
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar

NICENESS: Final = 5
"""Of the forks: tokens come first."""
AT_ONCE: Final = 2
MOST_CPU_S: Final = 5
MOST_WALL_S: Final = 60.0
MOST_MEMORY: Final = 512 * 2**20
MOST_STACK: Final = 4 * 2**20
"""Half of what a thread has where the grammar is compiled again."""
MOST_BYTES: Final = 64 * 2**20
"""Of one compiled grammar."""
_WARNING: Final = re.compile(r"Warning: (.*)")


@dataclass(slots=True)
class _Trial:
    """A fork at work."""

    number: int
    pid: int
    ends_at: float
    answer: bytes = b""


class TrialServer:
    """Answers one parent until its end of the input is closed."""

    def __init__(self, compiler: GrammarCompiler, given: int, begun: bytes, answers: int) -> None:
        """`given`, `answers`: file descriptors. `begun`: what was read already."""
        self._compiler = compiler
        self._given, self._answers = given, answers
        self._partial = begun
        self._waiting: deque[bytes] = deque()
        self._trials: dict[int, _Trial] = {}
        """By the end of the pipe that its answer comes out of."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(given, selectors.EVENT_READ)

    def serve(self) -> None:
        """Return when the parent is gone."""
        self._split()
        while True:
            while self._waiting and len(self._trials) < AT_ONCE:
                self._begin(json.loads(self._waiting.popleft()))
            ends = [trial.ends_at for trial in self._trials.values()]
            for key, _ in self._selector.select(max(min(ends) - time.monotonic(), 0) if ends else None):
                if key.fd != self._given:
                    self._read(key.fd)
                elif not self._take_in():
                    for trial in self._trials.values():
                        os.kill(trial.pid, signal.SIGKILL)
                    return
            for trial in self._trials.values():
                if trial.ends_at <= time.monotonic():
                    os.kill(trial.pid, signal.SIGKILL)  # its pipe ends
                    trial.ends_at += MOST_WALL_S

    def _take_in(self) -> bool:
        """Read what the parent wrote; False at its end."""
        data = os.read(self._given, 2**20)
        self._partial += data
        self._split()
        return bool(data)

    def _split(self) -> None:
        *lines, self._partial = self._partial.split(b"\n")
        self._waiting += lines

    def _begin(self, told: dict[str, Any]) -> None:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            os.close(self._answers)  # a parent whose process is gone shall see the end of it
            _try_out(self._compiler, Grammar(told["kind"], told["source"]), into)
        os.close(into)
        self._trials[out] = _Trial(told["id"], pid, time.monotonic() + MOST_WALL_S)
        self._selector.register(out, selectors.EVENT_READ)

    def _read(self, out: int) -> None:
        """Read what a fork wrote, and answer once it has ended."""
        trial = self._trials[out]
        data = os.read(out, 2**16)
        trial.answer += data
        if data:
            return
        self._selector.unregister(out)
        os.close(out)
        del self._trials[out]
        _, status = os.waitpid(trial.pid, 0)
        answer = json.loads(trial.answer) if trial.answer else {"error": _why(status)}
        line = json.dumps({"id": trial.number, **answer}).encode() + b"\n"
        while line:
            line = line[os.write(self._answers, line) :]


def _why(status: int) -> str:
    """Of a fork that ended without an answer: it was stopped, or had no more memory or stack."""
    stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    if stopped:
        return f"`grammar` takes more than {MOST_CPU_S} s to compile"
    return f"`grammar` takes more than {MOST_MEMORY // 2**20} MiB to compile, or is nested too deeply"


def _try_out(compiler: GrammarCompiler, grammar: Grammar, into: int) -> None:
    """In the fork: compile within the limits, write the answer, end the process."""
    try:
        warnings = os.memfd_create("warnings")
        os.dup2(warnings, sys.stderr.fileno())
        os.nice(NICENESS)
        _limit()
        answer: dict[str, Any] = _tried(compiler, grammar)
        os.lseek(warnings, 0, os.SEEK_SET)
        if warned := _WARNING.search(os.read(warnings, 2**16).decode(errors="replace")):
            answer = {"error": f"`grammar`: {told(warned[1])}"}
        os.write(into, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_STACK, (MOST_STACK, MOST_STACK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tried(compiler: GrammarCompiler, grammar: Grammar) -> dict[str, Any]:
    try:
        check_schemas(grammar)
        nbytes = compile_source(compiler, grammar).memory_size_bytes
    except InvalidRequest as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"`grammar` takes more than {MOST_MEMORY // 2**20} MiB to compile"}
    if nbytes > MOST_BYTES:
        return {"error": f"`grammar` is {nbytes // 2**20} MiB when compiled; at most {MOST_BYTES // 2**20} are allowed"}
    return {"nbytes": nbytes}


def main() -> None:
    given, answers = sys.stdin.fileno(), os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    read = b""
    while b"\n" not in read:
        data = os.read(given, 2**20)
        if not data:
            return
        read += data
    vocabulary, _, begun = read.partition(b"\n")
    compiler = grammar_compiler(TokenizerInfo.deserialize_json(vocabulary.decode()))
    TrialServer(compiler, given, begun, answers).serve()


if __name__ == "__main__":
    main()
