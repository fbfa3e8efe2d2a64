"""Logging of our own processes, and what a process says about itself."""

from __future__ import annotations

import json
import logging
import os
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

import psutil

current_request_id: Final[ContextVar[str]] = ContextVar("current_request_id", default="")
"""The id of the HTTP request that this task answers; "": none."""
FIELDS: Final = "fields"
"""`extra={FIELDS: {…}}`: what a record says besides its message, in the JSON format."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Keys: timestamp, level, logger, message; request_id, other fields and exception where there are some."""
        told: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            told["request_id"] = request_id
        told |= getattr(record, FIELDS, {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


FORMATTERS: Final[dict[str, logging.Formatter]] = {
    "text": logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"),
    "json": JsonFormatter(),
}


def configure(level: str, log_format: str = "text") -> None:
    """Send the package's log records at `level` and above to stderr, in a format of `FORMATTERS`; once per process."""
    logger = logging.getLogger("moe_ray")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(FORMATTERS[log_format])
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
