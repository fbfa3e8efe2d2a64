"""Checks of the machine: directories, sockets' paths, shared memory, limits of files and memory, disks."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from moe_ray.deploy.places import can_write, ray_directory, serves_python, usable_cache
from moe_ray.deploy.ray_internals import AUTH_TOKEN, AUTH_TOKEN_PATH, TEMP_DIR
from moe_ray.doctor.finding import Finding, Subject, as_size, error, ok, warning
from moe_ray.errors import ConfigError

SHARED_MEMORY: Final = Path("/dev/shm")
OBJECT_STORE_BYTES: Final = 512 * 2**20
"""Of a Ray that `moe-ray serve` starts."""
LEAST_FILES: Final = 1024
"""Open files that a server with some clients takes."""
ENOUGH_FILES: Final = 8192
LEAST_DISK: Final = 2 * 2**30
DISK_SHARE: Final = 0.05
"""Ray stops writing to a disk with less than this free."""
CGROUP_V2: Final = Path("/sys/fs/cgroup")
CGROUP_V1: Final = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Directories and limits that this process has."""

    home: str
    home_writable: bool
    has_own_token: bool
    """Ray's token comes from the environment, so none is written."""
    cache: Path
    cache_writable: bool
    cache_instead: Path | None
    """What is used where the configured one cannot be written; None: there is none."""
    tmpdir: str | None
    tmpdir_serves: bool
    ray_directory: Path | None
    ray_directory_fault: str | None
    shm_writable: bool
    shm_free: int
    files: tuple[int, int]
    """Soft and hard limit of open files; -1: none."""
    memory: int
    """Bytes of the machine."""
    memory_limit: int | None
    """Bytes that the control group allows."""
    disks: tuple[tuple[Path, int, int], ...]
    """(directory, bytes free, bytes in all) of where models and Ray's session are."""


def machine_facts(subject: Subject) -> MachineFacts:
    """Look at this process's machine."""
    environ, cache = subject.environ, subject.config.cache_dir
    try:
        instead: Path | None = usable_cache(cache)
    except ConfigError:
        instead = None
    session, fault = None, None
    try:
        session = ray_directory(environ)
    except ConfigError as failure:
        fault = str(failure)
    home, tmpdir = os.path.expanduser("~"), environ.get("TMPDIR")
    shm = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK | os.X_OK)
    places = dict.fromkeys(_existing(each) for each in (instead, session) if each is not None)
    return MachineFacts(
        home=home,
        home_writable=can_write(Path(home)),
        has_own_token=bool(environ.get(AUTH_TOKEN) or environ.get(AUTH_TOKEN_PATH)),
        cache=cache,
        cache_writable=instead == cache,
        cache_instead=instead,
        tmpdir=tmpdir,
        tmpdir_serves=tmpdir is None
        or (serves_python(Path(tmpdir)) and str(session) == (environ.get(TEMP_DIR) or tmpdir)),
        ray_directory=session,
        ray_directory_fault=fault,
        shm_writable=shm,
        shm_free=shutil.disk_usage(SHARED_MEMORY).free if shm else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE),
        memory=psutil.virtual_memory().total,
        memory_limit=memory_limit(),
        disks=tuple((path, shutil.disk_usage(path).free, shutil.disk_usage(path).total) for path in places),
    )


def memory_limit(v2: Path = CGROUP_V2, v1: Path = CGROUP_V1) -> int | None:
    """Bytes that the control group of this container allows; None where there is no limit."""
    for path in (v2 / "memory.max", v1 / "memory.limit_in_bytes"):
        try:
            said = path.read_text().strip()
        except OSError:
            continue
        limit = int(said) if said.isdigit() else None
        return limit if limit is not None and limit < 2**60 else None  # version 1 says "none" as a huge number
    return None


def available_memory() -> int:
    """Bytes that new processes may take: what is free, within the control group's limit."""
    limit, free = memory_limit(), psutil.virtual_memory().available
    return free if limit is None else min(free, limit)


def check_home(facts: MachineFacts) -> list[Finding]:
    """Ray's token can be kept."""
    if facts.home_writable:
        return [ok("home", facts.home)]
    says = f"{facts.home} cannot be written"
    if facts.has_own_token:
        return [ok("home", f"{says}; Ray's token is from the environment")]
    if facts.cache_instead is None:
        return [error("home", f"{says}, nor a temporary directory", "set HOME or TMPDIR to a directory you may write")]
    says += ": Ray's token is kept in a temporary directory of this user"
    return [warning("home", says, "set HOME to a directory you may write, or RAY_AUTH_TOKEN")]


def check_cache(facts: MachineFacts) -> list[Finding]:
    """The demo model, GGUF files and native libraries have a place."""
    mend = "set MOE_RAY_CACHE_DIR to a directory you may write"
    if facts.cache_writable:
        return [ok("cache", str(facts.cache))]
    if facts.cache_instead is None:
        return [error("cache", f"{facts.cache} cannot be written, nor a temporary directory", mend)]
    return [warning("cache", f"{facts.cache} cannot be written; {facts.cache_instead} is used", mend)]


def check_temporary(facts: MachineFacts) -> list[Finding]:
    """Ray's session has a directory whose path is short enough for sockets."""
    if facts.ray_directory_fault is not None:
        return [error("temporary", facts.ray_directory_fault, "see docs/deployment.md, a machine that is not as usual")]
    if not facts.tmpdir_serves:
        says = f"TMPDIR={facts.tmpdir} is too long for Unix sockets or cannot be written; {facts.ray_directory} is used"
        return [warning("temporary", says, f"set {TEMP_DIR} to a short path that you may write")]
    return [ok("temporary", f"Ray's session is in {facts.ray_directory}")]


def check_shared_memory(facts: MachineFacts) -> list[Finding]:
    """Ray's object store fits."""
    if not facts.shm_writable:
        says = f"{SHARED_MEMORY} is not there or cannot be written: Ray's object store is on disk"
        return [warning("shared memory", says, "mount a tmpfs there; in a container: --shm-size=1g")]
    if facts.shm_free < OBJECT_STORE_BYTES:
        says = f"{as_size(facts.shm_free)} free in {SHARED_MEMORY}, Ray's object store takes up to "
        mend = "end what fills it; in a container: --shm-size=1g"
        return [warning("shared memory", says + as_size(OBJECT_STORE_BYTES), mend)]
    return [ok("shared memory", f"{as_size(facts.shm_free)} free in {SHARED_MEMORY}")]


def check_open_files(facts: MachineFacts) -> list[Finding]:
    """Sockets and files are not short."""
    soft, hard = facts.files
    most = "" if hard in (soft, resource.RLIM_INFINITY) else f" (this user may raise it to {hard})"
    mend = "ulimit -n 65536, or LimitNOFILE= of the service"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        return [error("open files", f"at most {soft}{most}, a server takes {LEAST_FILES}", mend)]
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_FILES:
        return [warning("open files", f"at most {soft}{most}, which many clients use up", mend)]
    return [ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")]


def check_memory(facts: MachineFacts) -> list[Finding]:
    """Say what there is; a model's need is another check."""
    if facts.memory_limit is None or facts.memory_limit >= facts.memory:
        return [ok("memory", as_size(facts.memory))]
    return [ok("memory", f"{as_size(facts.memory_limit)} by the control group, of {as_size(facts.memory)}")]


def check_disks(facts: MachineFacts) -> list[Finding]:
    """There is room for downloads, and Ray does not refuse to write."""
    found = []
    for path, free, total in facts.disks:
        if free < max(LEAST_DISK, DISK_SHARE * total):
            says = f"{as_size(free)} of {as_size(total)} free at {path}"
            found.append(warning("disk", says, "free some: Ray stops writing to a disk that is 95 % full"))
    return found or [ok("disk", ", ".join(f"{as_size(free)} free at {path}" for path, free, _ in facts.disks))]


CHECKS: Final = (
    check_home,
    check_cache,
    check_temporary,
    check_shared_memory,
    check_open_files,
    check_memory,
    check_disks,
)


def examine_machine(subject: Subject) -> Sequence[Finding]:
    """Directories, limits, disks."""
    facts = machine_facts(subject)
    return [finding for check in CHECKS for finding in check(facts)]


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())
