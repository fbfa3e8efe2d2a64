"""Weights in FP8 with scales of tensors, rows or blocks, and what transformers reads of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Final

import quantised
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all."""
TENSOR: Final[Block] = (None, None)
ROW: Final[Block] = (1, None)


def theirs(
    values: torch.Tensor,
    block: Block,
    name: str,
    dtype: torch.dtype,
    kind: torch.dtype = torch.float8_e4m3fn,
) -> quantised.Made:
    """Quantised here; `Fp8Dequantize` reads any even grid of scales."""
    n, k = values.shape
    high, wide = block[0] or n, block[1] or k
    blocks = values.reshape(n // high, high, k // wide, wide)
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp(min=1e-6)
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.log2(scale).ceil())
    scale = scale.to(dtype)
    weight = (blocks / scale.float()).reshape(n, k).to(kind)
    grid = scale.reshape(n // high, k // wide)
    values = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, grid, torch.float32)
    return {"weight": weight, name: grid.reshape(()) if block == TENSOR else grid}, values
