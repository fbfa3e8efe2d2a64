"""What one card, or the CPU in its stead, gives: bytes read a second, and the time of work that is queued on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import psutil
import torch

from moe_ray.errors import CardDriverUnavailable
from moe_ray.model.compute.card_driver import driver_version

SWEEPS: Final = 5
READ_BYTES: Final = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Much more than any cache of such a device."""


def device_read_gb_s(device: torch.device) -> float:
    """Bytes that a sum over a large buffer reads each second, in GB; the median of `SWEEPS`."""
    buffer = torch.ones(READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    return buffer.nbytes / median_s(lambda: buffer.sum(), device) / 1e9


def median_s(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Median time of `run` in seconds, of `SWEEPS` sweeps of so many calls each, which are waited for together."""
    run()
    wait_for(device)
    seconds = []
    for _ in range(SWEEPS):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        wait_for(device)
        seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of_this_process() -> dict[str, int]:
    """`bytes` of the card that this process's tensors have taken at most; where it uses none, what is resident."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {"bytes": torch.cuda.max_memory_allocated()}
    return {"bytes": psutil.Process().memory_info().rss}


def card_of_this_process(device: torch.device) -> dict[str, object]:
    """The card's name, driver and instruction set; of a CPU nothing."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "card": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "card_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    try:
        return driver_version()
    except CardDriverUnavailable:
        return None
