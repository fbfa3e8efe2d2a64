"""`moe-ray status --watch`: the status again and again, drawn in place where standard output is a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from moe_ray.deploy.status import collect, status_view
from moe_ray.errors import NotReady

Wait = Callable[[float], bool]
"""Waits for so many seconds; True at once when the user wants to leave."""


def watch_status(address: str, interval_s: float, console: Console, as_json: bool) -> None:
    """Show the status every `interval_s` until q or Ctrl-C; elsewhere than in a terminal, one after the other.

    Raises what `collect` raises for the first look; later, an application that is gone is shown as that.
    """
    drawn = console.is_terminal and not console.is_dumb_terminal and not as_json
    snapshot = collect(address)
    with contextlib.suppress(KeyboardInterrupt), keys(drawn) as wait:
        if not drawn:
            while True:
                _print_plainly(console, snapshot, as_json)
                if wait(interval_s):
                    return
                snapshot = collect(address)
        with Live(_view(status_view(snapshot)), console=console, screen=True, auto_refresh=False) as live:
            while not wait(interval_s):
                live.update(_view(_look(address)), refresh=True)


def _print_plainly(console: Console, snapshot: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot), flush=True)
    else:
        console.print(status_view(snapshot))
        console.print()


def _look(address: str) -> RenderableType:
    try:
        return status_view(collect(address))
    except (NotReady, RayError, RayServeException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Text(lines[0], style="red")


def _view(inner: RenderableType) -> RenderableType:
    return Group(Text(f"{time.strftime('%H:%M:%S')}, q leaves\n", style="dim"), inner)


@contextmanager
def keys(drawn: bool) -> Iterator[Wait]:
    """A function that waits and looks for q, pressed without Enter where standard input is a terminal."""
    if not (drawn and sys.stdin.isatty()):
        yield _sleep
        return
    import termios
    import tty

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        yield lambda seconds: _pressed_q(file, seconds)
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _pressed_q(file: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([file], [], [], left)[0] and os.read(file, 1) in (b"q", b"Q", b""):
            return True
    return False
