"""The float formats: what they pack they find, read back and count; a part of a stack is as good as a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.foreign import SINGLE
from moe_ray.model.formats import (
    FLOATS,
    FORMATS,
    Place,
    ShapeMismatch,
    Source,
    StoredWeight,
    TensorEntry,
    TensorPart,
    dtype_bytes,
)
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.safetensors_file import DTYPES, numpy_dtype
from moe_ray.model.surplus import check_surplus
from moe_ray.model.weights import weights_of_model

SHAPE = (6, 32)


def stored_as(tensors: dict[str, torch.Tensor]) -> dict[str, TensorEntry]:
    """What a file's header would say of tensors that are written one after the other."""
    codes = {dtype: code for code, (dtype, _) in DTYPES.items()}
    entries, at = {}, 0
    for name, tensor in tensors.items():
        code = codes[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = TensorEntry(code, tuple(tensor.shape), at, tensor.nbytes)
        at += tensor.nbytes
    return entries


def of(entries: dict[str, TensorEntry]) -> Source:
    """A checkpoint of these headers, none of whose tensors is read to find a weight."""

    def read(name: str) -> np.ndarray:
        raise AssertionError(f"{name} is read")

    return Source(entries.get, read)


def read(data: bytes, entries: dict[str, TensorEntry], row: str, place: Place) -> np.ndarray:
    stored = FLOATS[row].find(place, SHAPE, of(entries))
    assert stored is not None
    assert (stored.format, stored.shape) == (row, SHAPE)
    arrays = []
    for part in stored.parts:
        start = entries[part.name].start + part.offset
        dtype = numpy_dtype(part.dtype)
        arrays.append(np.frombuffer(data[start : start + part.nbytes], dtype).reshape(part.shape))
    return FLOATS[row].decode(stored, arrays)


@pytest.mark.parametrize("row", FLOATS)
def test_what_is_packed_is_read_back(row: str) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    place = Place("model.layers.0.self_attn.q_proj")
    tensors = FLOATS[row].pack(place, values)
    assert tuple(tensors) == FLOATS[row].names(place)
    assert sum(tensor.nbytes for tensor in tensors.values()) == FLOATS[row].nbytes(SHAPE)
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    entries = stored_as(tensors)
    back = read(data, entries, row, place)
    np.testing.assert_array_equal(back.astype(np.float32), values.to(getattr(torch, row)).float().numpy())
    for other in set(FORMATS) - {row}:
        assert FORMATS[other].find(place, SHAPE, of(entries)) is None, "two formats would take one weight"


@pytest.mark.parametrize("row", FLOATS)
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


@pytest.mark.parametrize("row", FLOATS)
def test_absence_and_another_shape(row: str) -> None:
    place = Place("lm_head")
    assert FLOATS[row].find(place, SHAPE, of({})) is None
    tensors = FLOATS[row].pack(place, torch.zeros(5, 32))
    with pytest.raises(ShapeMismatch, match=r"shape \[5, 32\], config.json implies \[6, 32\]"):
        FLOATS[row].find(place, SHAPE, of(stored_as(tensors)))


@dataclass(frozen=True)
class Int8:
    """Rows of int8, each with a float32 scale: a format of several tensors, as those to come."""

    name: str = "int8, a scale a row"

    def names(self, place: Place) -> tuple[str, ...]:
        return place.named("weight"), place.named("weight_scale")

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        weight, scale = map(source.entry, self.names(place))
        if weight is None or scale is None or weight.dtype != "I8":
            return None
        sizes = (math.prod(shape), 4 * shape[0])
        shapes: tuple[tuple[int, ...], ...] = (shape, (shape[0],))
        return StoredWeight(
            self.name,
            shape,
            tuple(
                TensorPart(name, dtype, part, size, offset=place.index * size)
                for name, dtype, part, size in zip(self.names(place), ("I8", "F32"), shapes, sizes, strict=True)
            ),
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) + 4 * math.prod(shape[:-1])

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        codes, scales = arrays
        decoded: np.ndarray = codes.astype(np.float32) * scales.reshape(-1, 1)
        return decoded.reshape(stored.shape)

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> None:
        return

    def pack(self, place: Place, values: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = values.abs().amax(-1) / 127
        codes = (values / scales.unsqueeze(-1)).round().to(torch.int8)
        return dict(zip(self.names(place), (codes, scales), strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_row_is_all_that_a_format_needs(
    stacked: bool, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in a format of two tensors are found, counted, fingerprinted and read by code that does not know it."""
    added = Int8()
    monkeypatch.setitem(FORMATS, added.name, added)
    config = ModelConfig.load(random_model)
    source = Checkpoint.open(random_model)
    layout = config.family.layouts[1 if stacked else 0]
    tensors, expected = {}, {}
    together: dict[str, list[torch.Tensor]] = {}
    for weight in weights_of_model(config):
        values = source.read(weight, torch.float32)
        place = layout.place(weight, config.num_local_experts)
        if weight.expert is None:
            tensors.update(FLOATS["float32"].pack(place, values))
            continue
        codes, scales = added.pack(place, values).values()
        expected[weight] = codes.float() * scales.unsqueeze(-1)
        for name, tensor in zip(added.names(place), (codes, scales), strict=True):
            together.setdefault(name, []).append(tensor)
    for name, parts in together.items():  # one for each expert and part, in the order of a stack
        tensors[name] = (
            torch.cat(parts).reshape(config.num_local_experts, -1, *parts[0].shape[1:]) if stacked else parts[0]
        )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((random_model / "config.json").read_bytes())

    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout is layout
    check_surplus(checkpoint)
    assert checkpoint.check(expected) == sum(added.nbytes(weight.shape) for weight in expected)
    for weight, values in expected.items():
        assert torch.equal(checkpoint.read(weight, torch.float32), values), weight
    assert checkpoint.bytes_read == sum(added.nbytes(weight.shape) for weight in expected)
    prints = {checkpoint.fingerprint([weight]) for weight in expected}
    assert len(prints) == len(expected)
    codes, _ = checkpoint.arrays(checkpoint.find(next(iter(expected))))
    assert codes.dtype == np.int8


def test_bytes_of_a_dtype() -> None:
    assert {dtype: dtype_bytes(dtype) for dtype in ("float32", "bfloat16", "float16")} == {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
    }
