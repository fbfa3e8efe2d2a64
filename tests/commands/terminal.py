"""A command in a terminal of its own: what it shows, and keys pressed in it."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")
RUN = (
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that Ctrl-C is a signal
    "from moe_ray.commands.main import main; main()"
)
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """The screen and the keyboard of one process."""

    def __init__(self, process: subprocess.Popen[bytes], file: int) -> None:
        self.process = process
        self.raw = ""
        """All that was written, escapes with it."""
        self._file = file
        self._seen = 0

    def press(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def type(self, line: str) -> None:
        self.press(line + "\r")

    def until(self, pattern: str, timeout_s: float = 30) -> str:
        """Wait for text that matches behind what was waited for before; returns what came up to its end."""
        end = time.monotonic() + timeout_s
        while True:
            text = ESCAPES.sub("", self.raw).replace("\r", "")
            if found := re.compile(pattern).search(text, self._seen):
                said, self._seen = text[self._seen : found.end()], found.end()
                return said
            assert time.monotonic() < end, f"no {pattern!r} in {text[self._seen :]!r}"
            assert self._read(end - time.monotonic()), f"ended without {pattern!r}: {text[self._seen :]!r}"

    def ends(self, timeout_s: float = 10) -> int:
        """Wait for the process to end; its exit status."""
        end = time.monotonic() + timeout_s
        while self._read(max(end - time.monotonic(), 0)):
            pass
        return self.process.wait(timeout_s)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._file], [], [], max(timeout_s, 0))[0]:
            return False
        try:
            piece = os.read(self._file, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)


@contextmanager
def terminal(*arguments: str, lines: int = 24, columns: int = 80, **env: str) -> Iterator[Terminal]:
    """`moe-ray` with these arguments in a terminal; killed at the end if it still runs."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**inherited, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **env},
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait(10)
        os.close(master)
