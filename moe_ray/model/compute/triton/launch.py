"""Starts Triton, and its kernels: one description of a launch, for a card, for the interpreter, and to compile ahead.

Every file of kernels imports Triton through here, so that it is missed in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from moe_ray.errors import KernelsUnavailable

try:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource
except ImportError as error:
    raise KernelsUnavailable(f"Triton is not installed, pip install triton ({error})") from error

__all__ = ["INTERPRETED", "Launch", "tl", "triton"]

INTERPRETED: Final[bool] = triton.knobs.runtime.interpret
"""Whether kernels of this process run in Triton's interpreter, on tensors of a CPU: TRITON_INTERPRET, which counts when
a kernel is defined."""

Constant = int | float | bool | str | None
_POINTERS: Final = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch of a kernel, with all that Triton compiles it for.

    >>> Launch(kernel, (8,), {"x": rows}, {"count": 3}, {"K": 4096}).run()
    """

    kernel: Any
    """A function under `triton.jit`."""
    grid: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor | None]
    """Contiguous, and aligned to 16 bytes as torch allocates; None: without this one."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """What may differ from call to call. Kernels name them in `do_not_specialize`: one binary for all values."""
    constants: Mapping[str, Constant] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    contracted: bool = True
    """Whether a product and what is added to it may be rounded once; else twice, as torch's operations round."""

    def run(self) -> None:
        """Compute, on the device of the tensors. Returns before a card has finished."""
        self.kernel[self.grid](**self.tensors, **self.numbers, **self.constants, **self.options())

    def source(self) -> ASTSource:
        """What `triton.compile` takes, as `run` has it compiled. The tensors may be on the `meta` device."""
        names = self.kernel.arg_names
        given = {name: tensor for name, tensor in self.tensors.items() if tensor is not None}
        constants = {name: None for name, tensor in self.tensors.items() if tensor is None} | dict(self.constants)
        kinds = {name: _POINTERS[tensor.dtype] for name, tensor in given.items()}
        kinds |= dict.fromkeys(self.numbers, "i32") | dict.fromkeys(constants, "constexpr")
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in given}
        return ASTSource(self.kernel, {name: kinds[name] for name in names}, constants, aligned)

    def options(self) -> dict[str, int]:
        """What `triton.compile` takes beside the source and the target."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.contracted}
