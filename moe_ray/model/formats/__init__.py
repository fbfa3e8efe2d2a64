"""The weight formats that are read and written: a file and a row each. Nothing else branches on a format."""

from __future__ import annotations

from typing import Final

from moe_ray.model.formats import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, mxfp4, ternary
from moe_ray.model.formats.floats import FloatFormat
from moe_ray.model.formats.gguf_blocks import BLOCK_FORMATS
from moe_ray.model.formats.gguf_k import K_FORMATS
from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.quantization import Quantization
from moe_ray.model.formats.weight_format import (
    BadTensor,
    Place,
    RotaryPairs,
    ShapeMismatch,
    Source,
    StoredWeight,
    TensorEntry,
    TensorPart,
    WeightFormat,
)

__all__ = [
    "ALTERNATING",
    "FLOATS",
    "FORMATS",
    "BadTensor",
    "GroupedCodes",
    "Grouping",
    "Place",
    "Quantization",
    "RotaryPairs",
    "ShapeMismatch",
    "Source",
    "StoredWeight",
    "TensorEntry",
    "TensorPart",
    "WeightFormat",
    "dtype_bytes",
]

FLOATS: Final[dict[str, FloatFormat]] = {
    row.name: row
    for row in (FloatFormat("float32", "F32", 4), FloatFormat("bfloat16", "BF16", 2), FloatFormat("float16", "F16", 2))
}
"""Weights that are not quantised, by torch's name of the dtype."""
_QUANTISED: Final[tuple[WeightFormat, ...]] = (
    compressed_tensors.PACKED,
    compressed_tensors.INT8,
    gptq.V1,
    gptq.V2,
    awq.GEMM,
    bitsandbytes.NF4,
    bitsandbytes.FP4,
    bitsandbytes.INT8,
    fp8.FP8,
    mxfp4.MXFP4,
    hqq.HQQ,
    ternary.TERNARY,
    *BLOCK_FORMATS,
    *K_FORMATS,
)
ALTERNATING: Final = frozenset({*FLOATS, mxfp4.MXFP4.name})
"""Those that are read from stacks whose rows alternate, or are transposed."""
FORMATS: Final[dict[str, WeightFormat]] = {**FLOATS, **{row.name: row for row in _QUANTISED}}
"""By name. A weight is of the first format that finds it."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of rows, KV cache or weights in a float dtype."""
    return FLOATS[dtype].nbytes((1,))
