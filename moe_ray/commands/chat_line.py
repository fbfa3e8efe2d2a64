"""The line editor of `moe-ray chat`: readline, with a history that outlives the process, and completion."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

MOST_LINES: Final = 1000
"""Lines of the history that are kept."""

Complete = Callable[[str], Sequence[str]]
"""From what stands on the line to what it may become."""


class History:
    """Lines typed before, in a file that only its user may read. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[str]:
        """The last lines, oldest first; the file is cut to them where it has grown to twice as many."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            if stat.S_IMODE(self._path.stat().st_mode) != 0o600:
                self._path.chmod(0o600)
            if len(lines) > 2 * MOST_LINES:
                self._replace(lines[-MOST_LINES:])
        except OSError:  # none yet, or it cannot be read: a conversation goes on without
            return []
        return lines[-MOST_LINES:]

    def add(self, line: str) -> None:
        """Append a line; nothing happens where the file cannot be written."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, line.encode("utf-8", "replace") + b"\n")
            finally:
                os.close(file)

    def _replace(self, lines: Sequence[str]) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, encoding="utf-8", delete=False) as file:
            file.write("".join(f"{line}\n" for line in lines))  # mode 600
        os.replace(file.name, self._path)


class LineEditor:
    """Reads lines from the terminal. One for a process, since readline has one state."""

    def __init__(self, history: History | None, complete: Complete) -> None:
        import readline

        self._readline = readline
        self._history = history
        self._complete = complete
        self._choices: Sequence[str] = ()
        readline.set_auto_history(False)
        readline.clear_history()
        for line in history.load() if history is not None else ():
            readline.add_history(line)
        readline.set_completer(self._choice)
        readline.set_completer_delims("")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def read(self, prompt: str) -> str:
        """One line. Raises `EOFError` at the end of input, `KeyboardInterrupt` for Ctrl-C."""
        return input(prompt)

    def remember(self, line: str) -> None:
        """Put a line into the history, unless it is the last one there."""
        length = self._readline.get_current_history_length()
        if length and self._readline.get_history_item(length) == line:
            return
        self._readline.add_history(line)
        if self._history is not None:
            self._history.add(line)

    def _choice(self, line: str, number: int) -> str | None:
        if number == 0:
            self._choices = self._complete(line)
        return self._choices[number] if number < len(self._choices) else None
