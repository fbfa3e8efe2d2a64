"""The weight formats that are read and written: a file and a row each. Nothing else branches on a format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from moe_ray.model.formats.base import Entry, Place, ShapeMismatch, StoredWeight, TensorPart, WeightFormat
from moe_ray.model.formats.floats import FloatFormat

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FORMATS",
    "STORED_DTYPES",
    "Entry",
    "Place",
    "ShapeMismatch",
    "StoredWeight",
    "TensorPart",
    "WeightFormat",
    "dtype_bytes",
    "numpy_dtype",
]

_FLOATS: Final = (
    FloatFormat("float32", "F32", 4),
    FloatFormat("bfloat16", "BF16", 2),
    FloatFormat("float16", "F16", 2),
)
FORMATS: Final[dict[str, WeightFormat]] = {row.name: row for row in _FLOATS}
"""By name. A weight is of the first format that finds it."""

STORED_DTYPES: Final = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "F8_E4M3": "float8_e4m3fn",
}
"""safetensors' dtype → numpy's (with ml_dtypes): what arrays can be made of."""


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """numpy's dtype of what safetensors calls `stored`."""
    import ml_dtypes  # noqa: F401 - tells numpy what bfloat16 is
    import numpy as np

    return np.dtype(STORED_DTYPES[stored])


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of rows, KV cache or weights in a float dtype."""
    return FORMATS[dtype].nbytes((1,))
