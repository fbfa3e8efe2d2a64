"""Builds the native libraries into DIR/native of `prebuild.py DIR`, for CPUs that this machine's need not be like.

Only those that exist for the architecture: without kernels torch computes, and the image works.
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
        if sys.platform == "linux" and platform.machine() in library.architectures:
            build.shared_library(library, cache_dir)
        else:
            print(f"no {library.name} for {sys.platform} on {platform.machine()}", file=sys.stderr)
    for lock in (cache_dir / "native").glob("*.lock"):
        lock.unlink()
    return sorted((cache_dir / "native").glob("*.so"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DIR")
    try:
        print(*prebuild(Path(sys.argv[1])), sep="\n")
    except KernelsUnavailable as error:
        sys.exit(f"error: {error}")
