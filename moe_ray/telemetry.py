"""Logging of our own processes, and what a process says about itself."""

from __future__ import annotations

import logging
import os
from typing import Any

import psutil


def configure(level: str) -> None:
    """Send the package's log records at `level` and above to stderr, once per process."""
    logger = logging.getLogger("moe_ray")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_status(process: psutil.Process) -> dict[str, Any]:
    """Pid, resident and proportional memory in bytes, CPU seconds."""
    memory, cpu = process.memory_info(), process.cpu_times()
    status: dict[str, Any] = {
        "pid": process.pid,
        "rss_bytes": memory.rss,
        "cpu_s": cpu.user + cpu.system,
        "nice": os.nice(0),
    }
    try:
        status["pss_bytes"] = process.memory_full_info().pss
    except (psutil.AccessDenied, AttributeError):  # not Linux, or a hardened container
        status["pss_bytes"] = None
    return status
