"""Products whose sums run in whatever order the library likes, to tell what the fixed order of our kernels costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F

from moe_ray.engine.torch_threads import torch_threads

DTYPES: Final = (torch.float32, torch.bfloat16)
"""float32: of the BLAS that torch has. bfloat16: of oneDNN."""


@dataclass(frozen=True, slots=True)
class TorchProduct:
    """One matrix in copies, multiplied by torch with as many threads as our kernels have."""

    dtype: torch.dtype
    copies: list[torch.Tensor]
    threads: int

    @property
    def name(self) -> str:
        return f"torch {str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes

    def products_of(self, x: np.ndarray) -> Callable[[], None]:
        """What multiplies x [rows, K] float32 by each copy."""
        rows = torch.from_numpy(x).to(self.dtype)

        def run() -> None:
            with torch.inference_mode(), torch_threads(self.threads):
                for weight in self.copies:
                    F.linear(rows, weight)

        return run


def torch_products(values: np.ndarray, threads: int, rotation_bytes: int) -> list[TorchProduct]:
    """values [N, K] float32 in each of `DTYPES`, in copies of `rotation_bytes` in all."""
    made = []
    for dtype in DTYPES:
        weight = torch.from_numpy(values).to(dtype)
        count = max(1, -(-rotation_bytes // weight.nbytes))
        made.append(TorchProduct(dtype, [weight, *(weight.clone() for _ in range(count - 1))], threads))
    return made
