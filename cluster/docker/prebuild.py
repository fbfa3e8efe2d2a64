"""Builds every native library into DIR/native of `prebuild.py DIR`, for CPUs that this machine's need not be like.

Nothing is built where moe_ray has no native code for the architecture: there torch computes, and the image works.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from moe_ray.errors import KernelsUnavailable
from moe_ray.native import build


def prebuild(cache_dir: Path) -> list[Path]:
    """Build what is missing and return all files. Raises `KernelsUnavailable` where one does not compile."""
    # Only the machine that runs them must have the instructions; loading a library does not execute them.
    build.cpu_flags = lambda: frozenset({"avx512_bf16"})  # type: ignore[assignment]
    for library in build.LIBRARIES:
        build.shared_library(library, cache_dir)
    for lock in (cache_dir / "native").glob("*.lock"):
        lock.unlink()
    return sorted((cache_dir / "native").glob("*.so"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print(f"no native library for {sys.platform} on {platform.machine()}: torch computes", file=sys.stderr)
        sys.exit()
    try:
        print(*prebuild(Path(sys.argv[1])), sep="\n")
    except KernelsUnavailable as error:
        sys.exit(f"error: {error}")
