"""Where the files of cluster/ are, and how its tests run commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent


def shell(*command: str | Path, timeout: float = 60, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what it prints is text."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, **kwargs)  # type: ignore[call-overload, no-any-return]


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a newcomer's shell: this Python's commands on PATH, no settings of ours or Ray's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOE_RAY_"))}
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    }


def tool(path: Path, script: str) -> Path:
    """Write a command that bash runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def module(path: Path) -> Any:
    """Import a script of cluster/ that is in no package."""
    spec = importlib.util.spec_from_file_location(f"cluster_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded
