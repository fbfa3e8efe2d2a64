"""Processes of a bench: each answers commands, one JSON line with another, and ends when its parent does.

The parent's end is `Child` and `gather`, the child's end is `answer_commands`. Commands come on standard input, so a
parent that is gone, however it went, is an end of file there: no child outlives its bench. Answers go to the pipe that
standard output was; what libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import psutil

from moe_ray.console import Report as Progress
from moe_ray.errors import MoeRayError

GRACE_S = 5.0
"""A child whose input ended may clean up for so long."""
Answer = dict[str, Any]
Handler = Callable[..., Answer]


class ChildFailed(MoeRayError):
    """A process of the bench reported an error or ended; names the process."""


class Child:
    """A process `python -m module` that runs `answer_commands`. Used by one thread."""

    def __init__(self, module: str, name: str) -> None:
        """Start it. Its own session, so that Ctrl-C reaches the parent alone, which then ends it in order."""
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._input, self.output = _pipe(self._process.stdin), _pipe(self._process.stdout)
        self._partial = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        """Send a command without waiting for its answer. Raises `ChildFailed` if the process is gone."""
        try:
            self._input.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise self.gone() from None

    def ask(self, do: str, progress: Progress | None = None, timeout_s: float = 600.0, **arguments: object) -> Answer:
        """Send a command and wait for its answer. Raises `ChildFailed`."""
        self.tell(do, **arguments)
        return gather([self], progress, timeout_s)[0]

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come, after `selectors` said that something has. Raises `ChildFailed` at the end."""
        data = os.read(self.output.fileno(), 1 << 20)
        if not data:
            raise self.gone()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def gone(self) -> ChildFailed:
        """The error to raise where the process has ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        return ChildFailed(f"{self.name} ended with status {self._process.returncode}; its standard error says why")

    def hang_up(self) -> None:
        """Let the process know that no more commands come; it ends by itself."""
        with contextlib.suppress(OSError):
            self._input.close()

    def close(self) -> None:
        """End the process, by force if it does not go within the grace, and wait until it is gone. Idempotent."""
        self.hang_up()
        try:
            self._process.wait(GRACE_S + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()


@contextmanager
def children() -> Iterator[Callable[[str, str], Child]]:
    """A function that starts a `Child`; all that it started are gone at the end, also after an error or Ctrl-C."""
    started: list[Child] = []

    def start(module: str, name: str) -> Child:
        started.append(Child(module, name))
        return started[-1]

    try:
        yield start
    finally:
        for child in started:
            child.hang_up()
        for child in started:
            child.close()


def gather(waited: Sequence[Child], progress: Progress | None = None, timeout_s: float = 600.0) -> list[Answer]:
    """Wait for one answer of each child, in their order, passing on what they report meanwhile.

    Raises `ChildFailed` when one reports an error, ends, or has not answered after `timeout_s`.
    """
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for child in waited:
            selector.register(child.output, selectors.EVENT_READ, child)
        while len(answers) < len(waited):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(child.name for child in waited if child.pid not in answers)
                raise ChildFailed(f"{silent} did not answer within {timeout_s:g} s")
            for key, _ in ready:
                child = key.data
                for message in child.read():
                    if "error" in message:
                        raise ChildFailed(f"{child.name}: {message['error']}")
                    if "answer" in message:
                        answers[child.pid] = message["answer"]
                        selector.unregister(child.output)
                    elif progress is not None:
                        progress(*message["progress"])
    return [answers[child.pid] for child in waited]


def pss_bytes(pids: Iterable[int]) -> int | None:
    """Proportional memory of these processes and all below them; None where the system does not tell."""
    total, seen = 0, set()
    for pid in pids:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            if process.pid in seen:
                continue
            seen.add(process.pid)
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
            except (psutil.AccessDenied, AttributeError):
                return None
    return total


class Parent:
    """The child's view of who started it."""

    def __init__(self) -> None:
        """Take standard input and output; end this process `GRACE_S` after the input did, whatever it does then."""
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last_report = 0.0
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def commands(self) -> Iterator[dict[str, Any]]:
        """The commands as they come, until there is no parent any more."""
        while (command := self._commands.get()) is not None:
            yield command

    def progress(self, what: str, done: int, total: int) -> None:
        """Report how far something has come; at most ten times a second."""
        now = time.monotonic()
        if done >= total or now - self._last_report > 0.1:
            self._last_report = now
            self.say(progress=(what, done, total))

    def say(self, **message: object) -> None:
        """Send one message; a parent that is gone is no error here."""
        with contextlib.suppress(BrokenPipeError):
            self._answers.write(json.dumps(message) + "\n")
            self._answers.flush()

    def _read(self) -> None:
        partial = b""
        while data := os.read(0, 1 << 16):  # not through sys.stdin: its lock would be held while the process ends
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self._commands.put(json.loads(line))
        self._commands.put(None)
        time.sleep(GRACE_S)
        os._exit(1)


def answer_commands(parent: Parent, handlers: Mapping[str, Handler]) -> None:
    """Answer commands on this thread until the parent hangs up. A `MoeRayError` is told; any other ends the process."""
    for command in parent.commands():
        handler = handlers[command.pop("do")]
        try:
            parent.say(answer=handler(**command))
        except MoeRayError as error:
            parent.say(error=str(error))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "Popen was asked for a pipe"
    return stream
