"""The header of a safetensors file.

The format: [header length, 8 bytes little-endian][header, JSON][the tensors' bytes]
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moe_ray.model.formats import TensorEntry
from moe_ray.model.tensor_file import NotWhole

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES: Final = 100_000_000
"""The bound that safetensors itself keeps."""


DTYPES: Final[dict[str, tuple[str, int]]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The format's name of a dtype → numpy's (with ml_dtypes), and the bytes of an element."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor name → what the header says of it, checked against the file's size. Raises `NotWhole`, `OSError`."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise NotWhole(f"{size} bytes, less than its header says it has")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(fields, 8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"unreadable header: {error!r}") from None
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise NotWhole(f"{size} bytes, its header says {end}")
    return entries


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """numpy's dtype of what the format calls `stored`."""
    import ml_dtypes  # noqa: F401 - tells numpy what bfloat16 is
    import numpy as np

    return np.dtype(DTYPES[stored][0])


def _entry(fields: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(f"data_offsets {[begin, end]} of shape {list(shape)}")
    dtype = fields["dtype"]
    if dtype in DTYPES and end - begin != DTYPES[dtype][1] * math.prod(shape):
        raise ValueError(f"{end - begin} bytes for {dtype} of shape {list(shape)}")
    return TensorEntry(str(fields["dtype"]), shape, data_start + begin, end - begin)
