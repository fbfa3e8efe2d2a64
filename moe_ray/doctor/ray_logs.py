"""The logs that Ray's processes, Serve and our actors have written on this machine: which there are, and their ends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

KINDS: Final = (
    "serve/**/*.log",  # controller, proxies, and our replicas as Serve names them
    "worker-*.err",
    "worker-*.out",
    "gcs_server.*",
    "raylet.*",
    "dashboard*.log",
    "monitor.*",
    "runtime_env*.log",
)
"""Below the directory of a session's logs."""
MOST_FILES: Final = 200
SESSIONS: Final = 2
"""The latest, of each directory."""


def session_logs(directories: Iterable[Path]) -> list[Path]:
    """The log directories of the latest sessions of Rays below these temporary directories, newest first."""
    found: dict[Path, str] = {}
    for directory in directories:
        sessions = [path for path in (directory / "ray").glob("session_2*") if (path / "logs").is_dir()]
        sessions.sort(key=lambda path: path.name, reverse=True)  # the name begins with the time of its start
        found |= {path / "logs": path.name for path in sessions[:SESSIONS]}
    return sorted(found, key=lambda path: found[path], reverse=True)


def log_files(logs: Path) -> list[Path]:
    """The files worth sending, those written last first, at most `MOST_FILES`; empty ones are left out."""
    files = {path for kind in KINDS for path in logs.glob(kind) if path.is_file() and path.stat().st_size}
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_FILES]


def end_of(path: Path, most_bytes: int) -> str:
    """The last whole lines of a file, at most so many bytes, with a line that says what is left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - most_bytes, 0)
        file.seek(start)
        content = file.read(most_bytes)
    text = content.decode("utf-8", "replace")
    if not start:
        return text
    return f"[{start:,} bytes left out]\n" + text.partition("\n")[2]
