"""Directories that are made once, whole or not at all, whichever processes want them."""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.convert.recipe import Progress


@contextmanager
def directory_at_once(target: Path) -> Iterator[Path]:
    """Yields a hidden work directory beside `target` that takes its place on a clean exit and is removed otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    replaced = work.with_suffix(".old")
    work.mkdir()
    try:
        yield work
        if target.exists():
            target.rename(replaced)
        work.rename(target)
    finally:
        if replaced.exists() and not target.exists():  # interrupted between the two renames
            replaced.rename(target)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def exclusive(target: Path, progress: Progress) -> Iterator[None]:
    """Holds an exclusive flock on a file beside `target`, waiting for it; the kernel frees it when a holder dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another process", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_once(target: Path, last: str, build: Callable[[Path], None], progress: Progress) -> None:
    """Have `build(directory)` make `target`, unless its file `last` is there: another process may have made it."""
    with exclusive(target, progress):
        if not (target / last).exists():
            with directory_at_once(target) as work:
                build(work)
