"""Every weight format: what it packs it finds, reads back and counts; a part of a stack is as good as a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_ray.model.formats import FORMATS, Entry, Place, ShapeMismatch, dtype_bytes
from moe_ray.model.safetensors_file import DTYPES, numpy_dtype

SHAPE = (6, 32)


def stored_as(tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
    """What a file's header would say of tensors that are written one after the other."""
    codes = {dtype: code for code, (dtype, _) in DTYPES.items()}
    entries, at = {}, 0
    for name, tensor in tensors.items():
        code = codes[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = Entry(code, tuple(tensor.shape), at, tensor.nbytes)
        at += tensor.nbytes
    return entries


def read(data: bytes, entries: dict[str, Entry], row: str, place: Place) -> np.ndarray:
    stored = FORMATS[row].find(place, SHAPE, entries.get)
    assert stored is not None
    assert (stored.format, stored.shape) == (row, SHAPE)
    arrays = []
    for part in stored.parts:
        start = entries[part.name].start + part.offset
        dtype = numpy_dtype(part.dtype)
        arrays.append(np.frombuffer(data[start : start + part.nbytes], dtype).reshape(part.shape))
    return FORMATS[row].decode(arrays, SHAPE)


@pytest.mark.parametrize("row", FORMATS)
def test_what_is_packed_is_read_back(row: str) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    place = Place("model.layers.0.self_attn.q_proj")
    tensors = FORMATS[row].pack(place, values)
    assert tuple(tensors) == FORMATS[row].names(place)
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMATS[row].nbytes(SHAPE)
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    entries = stored_as(tensors)
    back = read(data, entries, row, place)
    np.testing.assert_array_equal(back.astype(np.float32), values.to(getattr(torch, row)).float().numpy())
    for other in set(FORMATS) - {row}:
        assert FORMATS[other].find(place, SHAPE, entries.get) is None, "two formats would take one weight"


@pytest.mark.parametrize("row", FORMATS)
def test_a_part_of_a_stack(row: str) -> None:
    dtype = getattr(torch, row)
    whole = torch.randn(3, 2 * SHAPE[0], SHAPE[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    entries = stored_as({stem: whole})
    data = whole.view(torch.uint8).numpy().tobytes()
    for expert in range(3):
        for part in range(2):
            back = read(data, entries, row, Place(stem, experts=3, parts=2, index=2 * expert + part))
            wanted = whole[expert, part * SHAPE[0] : (part + 1) * SHAPE[0]].float().numpy()
            np.testing.assert_array_equal(back.astype(np.float32), wanted)


@pytest.mark.parametrize("row", FORMATS)
def test_absence_and_another_shape(row: str) -> None:
    place = Place("lm_head")
    assert FORMATS[row].find(place, SHAPE, {}.get) is None
    tensors = FORMATS[row].pack(place, torch.zeros(5, 32))
    with pytest.raises(ShapeMismatch, match=r"shape \[5, 32\], config.json implies \[6, 32\]"):
        FORMATS[row].find(place, SHAPE, stored_as(tensors).get)


def test_bytes_of_a_dtype() -> None:
    assert {dtype: dtype_bytes(dtype) for dtype in ("float32", "bfloat16", "float16")} == {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
    }
