"""Builds the native libraries with the machine's own C++ compiler, once per machine and version."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from moe_ray.errors import KernelsUnavailable

COMPILERS: Final = ("c++", "g++", "clang++")
COMMON: Final = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")
AVX512: Final = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC's own intrinsics headers set these off
)
HERE: Final = Path(__file__).parent
TIMEOUT_S: Final = 300
X86_64, ARM64 = "x86_64", "aarch64"
"""As `platform.machine` names them."""


@dataclass(frozen=True, slots=True)
class Library:
    """One native library: what it is made of, and what a CPU must have to run it."""

    name: str
    directory: Path
    sources: tuple[str, ...]
    """The first is compiled and includes the others."""
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    """Instruction sets, as Linux names them."""
    architectures: tuple[str, ...] = (X86_64, ARM64)
    """On which it compiles, under Linux."""


KERNELS: Final = Library(
    "kernels",
    HERE,
    ("kernels.cpp", "linear.h", "attention.h", "pool.h", "simd.h"),
    AVX512,
    frozenset({"avx512_bf16"}),
    (X86_64,),
)
HOST: Final = Library("host", HERE, ("host.cpp", "host.h", "calls.h", "connection.h", "cores.h", "frames.h"))
LINKS: Final = Library("links", HERE, ("links.cpp", "link.h", "frames.h"))
LIBRARIES: Final = (KERNELS, HOST, LINKS)
"""What a server uses."""


def shared_library(library: Library, cache_dir: Path) -> ctypes.CDLL:
    """Load a library, building it into `cache_dir`/native first if it is not there (several seconds).

    Safe to call from many processes at once: one builds, the others wait. Raises `KernelsUnavailable` saying what
    this machine lacks.
    """
    machine, known = platform.machine(), library.architectures
    if sys.platform != "linux" or machine not in known:
        where = f"this is {sys.platform} on {machine}"
        raise KernelsUnavailable(f"the {library.name} exist for Linux on {' or '.join(known)}, {where}")
    if lacking := library.needs - cpu_flags():
        raise KernelsUnavailable(f"this CPU has no {', '.join(sorted(lacking))} instructions")
    path = cache_dir / "native" / f"{library.name}-{_fingerprint(library)}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _compile(path, library)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path}: {error}") from None


def prepare(cache_dir: Path) -> None:
    """Build what this machine can run, so that no process has to wait for it later."""
    for library in LIBRARIES:
        with contextlib.suppress(KernelsUnavailable):
            shared_library(library, cache_dir)


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of this machine's CPU, as Linux names them; none elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return frozenset(
        next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), ())
    )


def declare(library: ctypes.CDLL, signatures: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    """Tell ctypes the functions of a library: name → (result, arguments)."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _fingerprint(library: Library) -> str:
    digest = hashlib.sha256(" ".join((*COMMON, *library.flags)).encode())
    for name in library.sources:
        digest.update((library.directory / name).read_bytes())
    return digest.hexdigest()[:16]


def _compile(path: Path, library: Library) -> None:
    wanted = os.environ.get("CXX")
    compiler = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise KernelsUnavailable(f"no C++ compiler found (looked for {wanted or ', '.join(COMPILERS)})")
    made = path.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *COMMON, *library.flags, "-o", str(made), str(library.directory / library.sources[0])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        if done.returncode:
            last = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise KernelsUnavailable(f"{compiler} could not build them: {last}")
        made.rename(path)
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler} took more than {TIMEOUT_S} s") from None
    finally:
        made.unlink(missing_ok=True)
