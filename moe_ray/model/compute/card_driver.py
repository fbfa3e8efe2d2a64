"""What NVIDIA's driver says of itself and its cards: by its files, its library and nvidia-smi. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Final

from moe_ray.errors import CardDriverUnavailable

LIBRARY: Final = "libcuda.so.1" if os.name == "posix" else "nvcuda.dll"
MODULE: Final = Path("/proc/driver/nvidia/version")
DEVICES: Final = Path("/dev")
ASK_TIMEOUT_S: Final = 10.0
MIB: Final = 2**20


def device_files(devices: Path = DEVICES) -> int:
    """How many cards this process sees as device files."""
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))


def module_version(module: Path = MODULE) -> str | None:
    """The version of the kernel's module; None: it is not loaded, or says none."""
    found = re.search(r"Kernel Module\D*([\d.]+)", module.read_text()) if module.exists() else None
    return found[1] if found else None


def driver_library() -> ctypes.CDLL:
    """The library by which processes reach the driver. Raises `CardDriverUnavailable` where it is not there."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CardDriverUnavailable(f"the driver's library {LIBRARY} cannot be loaded ({error})") from None


def latest_cuda() -> tuple[int, int]:
    """The latest CUDA that the driver's library speaks. Raises `CardDriverUnavailable` where it does not say."""
    number, library = ctypes.c_int(), driver_library()
    try:
        status = library.cuDriverGetVersion(ctypes.byref(number))
    except AttributeError:
        raise CardDriverUnavailable(f"{LIBRARY} has no cuDriverGetVersion") from None
    if status:
        raise CardDriverUnavailable(f"{LIBRARY} does not tell its version: CUDA's error {status}")
    return number.value // 1000, number.value % 1000 // 10


def driver_version() -> str:
    """The version that nvidia-smi says. Raises `CardDriverUnavailable` where it says none."""
    return _asked("driver_version", r"\d+(\.\d+)+")[0]


def memory_of_cards() -> list[int]:
    """Bytes of memory of each card that tells. Raises `CardDriverUnavailable` where none does."""
    return [int(line) * MIB for line in _asked("memory.total", r"\d+")]


def _asked(field: str, form: str) -> list[str]:
    """What nvidia-smi says of each card, a line each: those of the form asked for, whatever it ends with."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CardDriverUnavailable(f"nvidia-smi does not answer ({error})") from None
    lines = [line.strip() for line in done.stdout.splitlines()]
    if not (found := [line for line in lines if re.fullmatch(form, line)]):
        said = " | ".join(filter(None, (*lines, *done.stderr.splitlines()))) or "nothing"
        raise CardDriverUnavailable(f"nvidia-smi ends with {done.returncode} and says of {field}: {said[:300]}")
    return found
