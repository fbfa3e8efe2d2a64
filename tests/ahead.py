"""Compiles Triton's kernels ahead, for cards that are not here: a process of its own, without Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

SHARED_KIB: Final = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability → most shared memory of a thread block: CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"."""
LIKE_80: Final = (86, 89, 120)
"""Cards with the tensor-core instructions of 8.0 in Triton, and less shared memory: what is compiled for 8.0 has to fit
that, and for these a part of it is compiled."""
HALVES: Final = (75, 80)
"""Cards for which kernels of float16 are compiled, too: elsewhere those of bfloat16 stand for them."""
TENSOR_CORES: Final = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b([\w.:]*)")
ARITHMETIC: Final = re.compile(r"\b(fma|mul|add)(\.rn)?\.f32(x2)?\b")
STACK: Final = re.compile(r"STACK:(\d+)")


def shared_bytes(capability: int) -> int:
    """How much shared memory a kernel that is compiled for a card may have."""
    return 1024 * min(SHARED_KIB[each] for each in (capability, *(LIKE_80 if capability == 80 else ())))


def compiled(module: str, capability: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What `module.launches(name)` gives for each name, compiled, a row for each kernel.

    Beside name, kernel, bytes of shared memory, and the instruction of tensor cores: `stack`, bytes of a thread's
    registers that did not fit; `operations`, how many of each instruction of tensor cores, and of float32 how many
    rounded once (an instruction for two numbers counts as two); `row_blocks`, where the kernel has such.
    """
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
            row |= {"instruction": found.group(1) if found else None, "stack": _stack(made.asm["cubin"])}
            row |= {"operations": _operations(made.asm["ptx"]), "row_blocks": launch.constants.get("ROW_BLOCKS")}
            print(json.dumps(row))


def _operations(ptx: str) -> dict[str, int]:
    found = Counter("".join(each) for each in TENSOR_CORES.findall(ptx))
    for what, rounded, two in ARITHMETIC.findall(ptx):
        found[f"{what}{rounded}.f32"] += 2 if two else 1
    return found


def _stack(cubin: bytes) -> int:
    """Bytes of it by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = STACK.search(told.stdout)
    assert found is not None, told.stdout
    return int(found.group(1))
