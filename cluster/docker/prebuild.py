"""Builds the native libraries into DIR/native of `prebuild.py DIR`, for CPUs that this machine's need not be like.

Those of every instruction set of the architecture: which a machine has is seen when it runs the image.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_ray.errors import KernelsUnavailable
from moe_ray.native import build


def prebuild(cache_dir: Path) -> list[Path]:
    """Build what is missing and return all files. Raises `KernelsUnavailable` where one does not compile."""
    libraries = [*build.KERNELS.values(), build.HOST, build.LINKS]
    here = [each for each in libraries if sys.platform == "linux" and platform.machine() in each.architectures]
    if not here:
        print(f"no native libraries for {sys.platform} on {platform.machine()}", file=sys.stderr)
    # Only the machine that runs them must have the instructions; loading a library does not execute them.
    flags = frozenset().union(*(each.needs for each in here))
    build.cpu_flags = lambda: flags  # type: ignore[assignment]
    with ThreadPoolExecutor(os.cpu_count()) as builders:
        list(builders.map(lambda each: build.shared_library(each, cache_dir), here))
    for lock in (cache_dir / "native").glob("*.lock"):
        lock.unlink()
    shutil.rmtree(cache_dir / "native" / build.OBJECTS, ignore_errors=True)  # an image is not built again from parts
    return sorted((cache_dir / "native").glob("*.so"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR")
    try:
        print(*prebuild(Path(sys.argv[1])), sep="\n")
    except KernelsUnavailable as error:
        sys.exit(f"error: {error}")
