"""Compiles Triton's kernels ahead, for cards that are not here: a process of its own, without Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

SHARED_KIB: Final = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability → most shared memory of a thread block: CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"."""
TENSOR_CORES: Final = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


def compiled(module: str, capability: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What `module.launches(name)` gives for each name, compiled: rows of name, kernel, shared and instruction."""
    code = f"import ahead, {module}\nahead.tell({module}, {capability}, {list(names)!r})"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def tell(module: Any, capability: int, names: Sequence[str]) -> None:
    """Compile, and write a line of JSON for each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    for name in names:
        for launch in module.launches(name):
            target = GPUTarget("cuda", capability, 32)
            made = triton.compile(launch.source(), target=target, options=launch.options())
            found = TENSOR_CORES.search(made.asm["ptx"])
            row = {"name": name, "kernel": made.metadata.name, "shared": made.metadata.shared}
            print(json.dumps({**row, "instruction": found.group(1) if found else None}))
            assert made.asm["cubin"]
