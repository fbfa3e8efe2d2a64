"""The weight formats that are read and written: a file and a row each. Nothing else branches on a format."""

from __future__ import annotations

from typing import Final

from moe_ray.model.formats.floats import FloatFormat
from moe_ray.model.formats.gguf_blocks import BLOCK_FORMATS
from moe_ray.model.formats.gguf_k import K_FORMATS
from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.weight_format import (
    Place,
    ShapeMismatch,
    StoredWeight,
    TensorEntry,
    TensorPart,
    WeightFormat,
)

__all__ = [
    "FORMATS",
    "GroupedCodes",
    "Grouping",
    "Place",
    "ShapeMismatch",
    "StoredWeight",
    "TensorEntry",
    "TensorPart",
    "WeightFormat",
    "dtype_bytes",
]

_FLOATS: Final = (
    FloatFormat("float32", "F32", 4),
    FloatFormat("bfloat16", "BF16", 2),
    FloatFormat("float16", "F16", 2),
)
FORMATS: Final[dict[str, WeightFormat]] = {row.name: row for row in (*_FLOATS, *BLOCK_FORMATS, *K_FORMATS)}
"""By name. A weight is of the first format that finds it."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of rows, KV cache or weights in a float dtype."""
    return FORMATS[dtype].nbytes((1,))
