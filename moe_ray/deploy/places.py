"""Directories that a server needs to write: which can be used on this machine. No Ray is loaded."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moe_ray.deploy.ray_internals import LONGEST_SOCKET, TEMP_DIR
from moe_ray.errors import ConfigError

SOCKET_PATH_BYTES: Final = 103 if sys.platform == "darwin" else 107
"""The longest path of a Unix socket, without the zero byte that ends it."""
PYTHON_SOCKET: Final = "pymp-12345678/listener-12345678"
"""What `multiprocessing` binds below its temporary directory."""
FALLBACK: Final = Path("/tmp")


def can_write(directory: Path) -> bool:
    """Whether this process may create files in `directory`, creating it and its parents first where they lack."""
    try:
        there = next(candidate for candidate in (directory, *directory.parents) if candidate.exists())
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def fits_sockets(directory: Path) -> bool:
    """Whether the paths of Ray's sockets below `directory` are short enough."""
    return len(os.fsencode(directory / LONGEST_SOCKET)) <= SOCKET_PATH_BYTES


def serves_python(directory: Path) -> bool:
    """Whether Python's own processes, the dashboard's among them, can have sockets in a temporary `directory`."""
    return len(os.fsencode(directory / PYTHON_SOCKET)) <= SOCKET_PATH_BYTES and can_write(directory)


def ray_directory(environ: Mapping[str, str], fallback: Path = FALLBACK) -> Path:
    """Where a Ray that we start puts its session: $RAY_TMPDIR, or $TMPDIR where it serves, else /tmp.

    Raises `ConfigError` naming what to set where $RAY_TMPDIR does not serve, or neither of the others does.
    """
    room = SOCKET_PATH_BYTES - len(LONGEST_SOCKET) - 1
    advice = f"set {TEMP_DIR} to a directory that can be written, with a path of at most {room} bytes"
    if named := environ.get(TEMP_DIR):
        if fault := _fault(Path(named)):
            raise ConfigError(f"{TEMP_DIR}={named}: {fault}; {advice}")
        return Path(named)
    wanted = [Path(environ["TMPDIR"])] if environ.get("TMPDIR") else []
    for candidate in (*wanted, fallback):
        if not _fault(candidate):
            return candidate
    faults = "; ".join(f"{candidate}: {_fault(candidate)}" for candidate in dict.fromkeys((*wanted, fallback)))
    raise ConfigError(f"Ray has no directory for its session ({faults}): {advice}")


def _fault(directory: Path) -> str | None:
    if not directory.is_absolute():
        return "not an absolute path"
    if not fits_sockets(directory):
        return "its path is too long for Unix sockets"
    return None if can_write(directory / "ray") else "cannot be written"


def own_directory(parent: Path | None = None) -> Path:
    """A directory of this user alone below the temporary one, created if it lacks: for what a home would hold.

    Raises `ConfigError` where it cannot be created, or others may write to it.
    """
    name = f"moe-ray-{os.getuid()}"
    try:
        path = (parent or Path(tempfile.gettempdir())) / name
    except FileNotFoundError as error:
        raise ConfigError(f"no temporary directory can be written ({error.strerror}); set TMPDIR") from None
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be created ({error.strerror}); set TMPDIR") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path}: must be a directory of this user with mode 700; remove it, or set TMPDIR")
    return path


def usable_cache(wanted: Path) -> Path:
    """`wanted` where it can be written, else a directory of this user alone below the temporary one.

    Raises `ConfigError` saying what to set where there is none.
    """
    if can_write(wanted):
        return wanted
    try:
        return own_directory()
    except ConfigError as error:
        raise ConfigError(f"cache directory {wanted} cannot be written; set MOE_RAY_CACHE_DIR ({error})") from None
