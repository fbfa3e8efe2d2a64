"""The server that a bench starts for itself, and the memory of any server's processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import httpx
import psutil

from moe_ray.bench.free_port import free_port
from moe_ray.errors import ConfigError, NotReady

MIB = 2**20
MOE_RAY = (sys.executable, "-c", "from moe_ray.commands.main import main; main()")
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 30.0
GREET_TIMEOUT_S = 30.0
DYING_S = 1.0
"""How long a server may take to end after a request of the bench has failed by it."""
POLL_S = 0.25
TOLD_LINES = 3


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A `moe-ray serve` on loopback that is ready."""

    url: str
    pid: int
    ready_s: float
    ray_address: str = ""
    """host:port of its Ray; empty for a server that somebody else started."""


@contextmanager
def own_server(
    model: Path, settings: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
) -> Iterator[OwnServer]:
    """Serve `model` from a process group of its own, with the defaults of `moe-ray serve`; ended on leaving.

    `settings`: environment variables beside those that there are; `arguments`: further flags.
    Main thread only: meanwhile SIGTERM is what Ctrl-C is, so that it leaves no server behind, and is told. Raises
    `NotReady` with what the server said where it does not come up, or has ended by itself when it is left, whatever
    else went wrong then.
    """
    port = free_port()
    started = time.monotonic()
    with tempfile.TemporaryFile() as said, _handled(_told_to_end, signal.SIGTERM):
        process = subprocess.Popen(
            [*MOE_RAY, "serve", "--model", str(model), "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(settings or {})},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, url, said)
            ready_s = time.monotonic() - started
            try:
                yield OwnServer(url, process.pid, ready_s, _ray_address(said))
            except Exception as error:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(DYING_S)
                _check_alive(process, said, error)
                raise
            _check_alive(process, said)
        finally:
            with _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                _stop(process)


def tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants. Raises `ConfigError` where there is no such process."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise ConfigError(f"no process has the id {pid}") from None


def pss_mib(pid: int) -> int | None:
    """Memory of a process tree, pages that several share counted once; None where the system does not tell."""
    total = 0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            try:
                total += process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):  # of another user; not Linux
                return None
    return round(total / MIB)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None] | signal.Handlers, *which: int) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in which}
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def _wait_ready(process: subprocess.Popen[bytes], url: str, said: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        _check_alive(process, said)
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(POLL_S)
    raise NotReady(f"the server is not ready after {START_TIMEOUT_S:g} s: {_last_lines(said)}")


def _check_alive(process: subprocess.Popen[bytes], said: IO[bytes], error: Exception | None = None) -> None:
    """Raise `NotReady`, because of `error`, with the server's last lines where it has ended."""
    if process.poll() is not None:
        raise NotReady(f"the server ended with status {process.returncode}: {_last_lines(said)}") from error


def _told_to_end(number: int, _: FrameType | None) -> NoReturn:
    print(f"told to end by {signal.Signals(number).name}: the server ends as well", file=sys.stderr)
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server, which ends its own processes; after a while kill its group and whoever left that."""
    family = tree(process.pid) if process.poll() is None else []
    if family:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for left in psutil.wait_procs(family, timeout=3)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


def _last_lines(said: IO[bytes]) -> str:
    said.seek(0)
    return " | ".join(said.read().decode(errors="replace").strip().splitlines()[-TOLD_LINES:])


def _ray_address(said: IO[bytes]) -> str:
    """Where the server says that its Ray is: a moment after it is ready."""
    deadline = time.monotonic() + GREET_TIMEOUT_S
    while time.monotonic() < deadline:
        said.seek(0)
        if found := re.search(r"moe-ray status --address (\S+)", said.read().decode(errors="replace")):
            return found[1]
        time.sleep(POLL_S)
    raise NotReady(f"the server did not say where its Ray is: {_last_lines(said)}")
