"""Builds the native libraries with the machine's own C++ compiler, once per machine and version."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from moe_ray.errors import KernelsUnavailable
from moe_ray.native.compilers import find_compiler, first_error, run_compiler

COMMON: Final = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra")
AVX2: Final = (
    *("-mavx2", "-mfma", "-mf16c"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC's own intrinsics headers set these off
)
AVX512: Final = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
HERE: Final = Path(__file__).parent
TRIAL_TIMEOUT_S: Final = 30
OBJECTS: Final = "objects"
"""Folder of the cache's libraries that keeps what they are linked of."""
_TRIAL: Final = (
    "#include <thread>\nint main() { return static_cast<int>(std::thread::hardware_concurrency() >> 31); }\n"
)
X86_64, ARM64 = "x86_64", "aarch64"
"""As `platform.machine` names them."""


@dataclass(frozen=True, slots=True)
class Library:
    """One native library: what it is made of, and what a CPU must have to run it."""

    name: str
    directory: Path
    units: tuple[str, ...]
    """Each is compiled by itself, side by side, with what it includes; best those first that take longest."""
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    """Instruction sets, as Linux names them."""
    architectures: tuple[str, ...] = (X86_64, ARM64)
    """On which it compiles, under Linux."""


KERNEL_UNITS: Final = (
    *("kernels.cpp", "attention_float32.cpp", "attention_float16.cpp", "attention_bfloat16.cpp"),
    *("attention_int8.cpp", "attention_float8.cpp", "products.cpp"),
)


def _kernels(name: str, architecture: str, needs: str, flags: tuple[str, ...]) -> Library:
    return Library(f"kernels-{name}", HERE, KERNEL_UNITS, flags, frozenset(needs.split()), (architecture,))


_AVX512: Final = "avx512f avx512bw avx512vl avx512dq avx2 fma f16c"
KERNELS: Final = {
    "avx512_bf16": _kernels(
        *("avx512_bf16", X86_64, f"{_AVX512} avx512_vnni avx512_bf16"),
        (*AVX512, "-mavx512vnni", "-mavx512bf16"),
    ),
    "avx512_vnni": _kernels("avx512_vnni", X86_64, f"{_AVX512} avx512_vnni", (*AVX512, "-mavx512vnni")),
    "avx512": _kernels("avx512", X86_64, _AVX512, AVX512),
    "avx_vnni": _kernels("avx_vnni", X86_64, "avx2 fma f16c avx_vnni", (*AVX2, "-mavxvnni")),
    "avx2": _kernels("avx2", X86_64, "avx2 fma f16c", AVX2),
    "neon_dotprod": _kernels("neon_dotprod", ARM64, "asimd asimddp", ("-march=armv8.2-a+dotprod",)),
    "neon": _kernels("neon", ARM64, "asimd", ("-march=armv8-a",)),
}
"""The same source for each instruction set, best first."""
HOST: Final = Library("host", HERE, ("host.cpp",))
LINKS: Final = Library("links", HERE, ("links.cpp",))
_INCLUDED: Final = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
T = TypeVar("T")
R = TypeVar("R")


def best_kernels(flags: frozenset[str], architecture: str) -> str | None:
    """The name of the best kernels for a CPU with these instruction sets; None: there are none."""
    return next(
        (name for name, row in KERNELS.items() if architecture in row.architectures and row.needs <= flags), None
    )


def kernels_here() -> str | None:
    """The name of the best kernels for this machine; None: there are none."""
    return best_kernels(cpu_flags(), platform.machine()) if sys.platform == "linux" else None


def libraries() -> list[Library]:
    """What a server on this machine uses."""
    best = kernels_here()
    return [*([KERNELS[best]] if best else []), HOST, LINKS]


def shared_library(library: Library, cache_dir: Path) -> ctypes.CDLL:
    """Load a library, building it into `cache_dir`/native first if it is not there (many seconds).

    Safe to call from many processes at once: one builds, the others wait. Raises `KernelsUnavailable` saying what
    this machine lacks.
    """
    machine, known = platform.machine(), library.architectures
    if sys.platform != "linux" or machine not in known:
        where = f"this is {sys.platform} on {machine}"
        raise KernelsUnavailable(f"{library.name} exist for Linux on {' or '.join(known)}, {where}")
    if lacking := library.needs - cpu_flags():
        raise KernelsUnavailable(f"this CPU has no {', '.join(sorted(lacking))} instructions")
    path = _path(library, cache_dir)
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

    def build(library: Library) -> None:
        with contextlib.suppress(KernelsUnavailable):
            shared_library(library, cache_dir)

    _side_by_side(build, libraries())


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


def fingerprint_of(kernels: str) -> str:
    """Names the sources and the flags of a row of `KERNELS`."""
    return _fingerprint(KERNELS[kernels])


def sources_of(library: Library, units: tuple[str, ...] | None = None) -> list[Path]:
    """The files that some of its units (default: all) are made of: themselves, and what they include."""
    found: set[str] = set()
    rest = list(library.units if units is None else units)
    while rest:
        name = rest.pop()
        if name not in found:
            found.add(name)
            rest += _INCLUDED.findall((library.directory / name).read_text("utf-8"))
    return [library.directory / name for name in sorted(found)]


def _fingerprint(library: Library, units: tuple[str, ...] | None = None, compiler: str = "") -> str:
    digest = hashlib.sha256(" ".join((compiler, *COMMON, *library.flags)).encode())
    for path in sources_of(library, units):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_built(library: Library, cache_dir: Path) -> bool:
    """Whether a library lies in the cache, built from the sources as they are now."""
    return _path(library, cache_dir).exists()


def try_compiler(library: Library) -> str:
    """Compile a line that needs the standard library with a library's flags; returns the compiler's path.

    Raises `KernelsUnavailable` saying what is lacking.
    """
    compiler = find_compiler()
    command = [compiler, *COMMON, *library.flags, "-shared", "-x", "c++", "-", "-o", os.devnull]
    try:
        done = subprocess.run(
            command, input=_TRIAL, capture_output=True, text=True, check=False, timeout=TRIAL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{compiler} took more than {TRIAL_TIMEOUT_S} s for one line") from None
    if done.returncode:
        raise KernelsUnavailable(f"{compiler} cannot compile: {first_error(done.stderr, done.returncode)}")
    return compiler


def _path(library: Library, cache_dir: Path) -> Path:
    return cache_dir / "native" / f"{library.name}-{_fingerprint(library)}.so"


def _compile(path: Path, library: Library) -> None:
    """Make the library of its units' objects, of which those are compiled that are not in the cache."""
    compiler = find_compiler()
    objects = path.parent / OBJECTS
    objects.mkdir(exist_ok=True)

    def compiled(unit: str) -> Path:
        made = objects / f"{library.name}-{Path(unit).stem}-{_fingerprint(library, (unit,), compiler)}.o"
        if not made.exists():
            run_compiler(made, [compiler, *COMMON, *library.flags, "-c", str(library.directory / unit)])
        return made

    made = _side_by_side(compiled, library.units)
    run_compiler(path, [compiler, *COMMON, *library.flags, "-shared", *map(str, made)])


def _side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `work` makes of each item, each on a thread of its own that keeps no process from ending.

    Raises what the first item raised that failed, when all are done.
    """
    made: list[Future[R]] = [Future() for _ in items]

    def run(item: T, result: Future[R]) -> None:
        try:
            result.set_result(work(item))
        except BaseException as error:  # noqa: BLE001 - raised by the thread that asked
            result.set_exception(error)

    for item, result in zip(items, made, strict=True):
        threading.Thread(target=run, args=(item, result), name="native-build", daemon=True).start()
    wait(made)
    return [result.result() for result in made]
