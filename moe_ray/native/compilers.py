"""Finds the machine's C++ compiler and runs it, behind what else the machine does."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from moe_ray.errors import KernelsUnavailable

COMPILERS: Final = ("c++", "g++", "clang++")
TIMEOUT_S: Final = 300
_CPUS: Final = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
_COMPILERS: Final = threading.BoundedSemaphore(_CPUS)
"""As many of this process run at a time."""
_NICENESS: Final = 10
"""Of compilers: what starts meanwhile, Ray for one, is waited for, and gives up after its time."""
_running: set[subprocess.Popen[str]] = set()


def find_compiler() -> str:
    """The path of the C++ compiler. Raises `KernelsUnavailable` where there is none."""
    wanted = os.environ.get("CXX")
    compiler = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise KernelsUnavailable(f"no C++ compiler found (looked for {wanted or ', '.join(COMPILERS)})")
    return compiler


def first_error(said: str, status: int) -> str:
    return next((line for line in said.splitlines() if "error" in line), f"exit {status}")


def run_compiler(target: Path, command: list[str]) -> None:
    """Run a compiler that writes `target`, which is there whole or not at all. Raises `KernelsUnavailable`."""
    made = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with _COMPILERS:
            failed = _fault_of([*command, "-o", str(made)])
        if failed:
            raise KernelsUnavailable(f"{command[0]} could not build them: {failed}")
        made.rename(target)
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{command[0]} took more than {TIMEOUT_S} s") from None
    finally:
        made.unlink(missing_ok=True)


def _fault_of(command: list[str]) -> str:
    """Run a compiler with its own processes as a group; what it says is wrong, "" where nothing is."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        _running.add(process)
        try:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            _, said = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise
        finally:
            _running.discard(process)
    return first_error(said, process.returncode) if process.returncode else ""


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


@atexit.register
def _stop_all() -> None:
    """A process that ends does not wait for compilers, and leaves none behind."""
    for process in tuple(_running):
        _stop(process)
