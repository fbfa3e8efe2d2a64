"""Every block type of GGUF against the package `gguf`, which dequantises by its own code."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from moe_ray.model.formats import FORMATS, Place, Source, TensorEntry
from moe_ray.model.formats.gguf_blocks import BLOCK_FORMATS
from moe_ray.model.formats.gguf_format import GgufFormat
from moe_ray.model.formats.gguf_k import K_FORMATS
from moe_ray.model.gguf_file import TYPES

ROWS, COLUMNS = 24, 512
GGUF = (*BLOCK_FORMATS, *K_FORMATS)
NOTHING: dict[str, np.ndarray] = {}
"""No tensor is read to find a weight."""
WRITTEN = [row for row in GGUF if row.stored in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]
"""Those that the package quantises."""
ROUNDED = {"Q4_1", "Q4_K"}
"""The offset takes in the code's middle, which costs a rounding; the others are exact."""


def ids(row: GgufFormat) -> str:
    return row.stored


def random_rows(row: GgufFormat, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Rows of random blocks, uint8 [rows, bytes]: every code and scale, the float16 among them of moderate size."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * COLUMNS // row.elements, row.block_bytes), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "MXFP4": ()}
    for start in halves.get(row.stored, (0, 2) if row.stored in ("Q4_1", "Q5_1") else (0,)):
        scales = rng.normal(0, 0.02, len(blocks)).astype("<f2")
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    if row.stored == "MXFP4":
        blocks[:, 0] = rng.integers(110, 135, len(blocks))
    return blocks.reshape(rows, -1)


def reference(row: GgufFormat, rows: np.ndarray) -> np.ndarray:
    return np.asarray(dequantize(rows, GGMLQuantizationType[row.stored]))


def check(row: GgufFormat, rows: np.ndarray) -> None:
    shape = (len(rows), COLUMNS)
    entries = {"blk.0.ffn_up.0.weight": TensorEntry(row.stored, shape, 0, rows.nbytes)}
    stored = row.find(Place("blk.0.ffn_up.0"), shape, Source(entries.get, NOTHING.__getitem__))
    assert stored is not None
    assert stored.nbytes == rows.nbytes == row.nbytes(shape)
    expected = reference(row, rows)
    found = row.decode(stored, [rows])
    assert found.dtype == np.float32
    codes = row.codes(stored, [rows])
    assert (codes is None) == (stored.grouping is None) == (row.how.group == 16)
    if row.stored in ROUNDED:
        blocks = np.abs(expected).reshape(-1, 32).max(-1, keepdims=True)
        assert (np.abs(found - expected).reshape(-1, 32) <= 4e-7 * (blocks + 16 * np.ptp(expected))).all()
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(found, expected)
    if codes is not None:
        assert codes.grouping == stored.grouping
        assert codes.codes.max() < 2**codes.grouping.bits
        np.testing.assert_array_equal(codes.values(), found)


@pytest.mark.parametrize("row", GGUF, ids=ids)
def test_random_blocks(row: GgufFormat) -> None:
    check(row, random_rows(row))


@pytest.mark.parametrize("row", WRITTEN, ids=ids)
def test_what_the_package_quantised(row: GgufFormat) -> None:
    values = np.random.default_rng(1).normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)
    rows = quantize(values, GGMLQuantizationType[row.stored])
    check(row, rows)
    assert np.abs(reference(row, rows) - values).max() < 0.05, "the reference reads what was written"


@pytest.mark.parametrize("row", GGUF, ids=ids)
def test_a_part_of_a_stack(row: GgufFormat) -> None:
    whole = random_rows(row, rows=3 * 2 * 4)
    entries = {"blk.0.ffn_gate_exps.weight": TensorEntry(row.stored, (3, 8, COLUMNS), 0, whole.nbytes)}
    expected = reference(row, whole).reshape(6, 4, COLUMNS)
    for index in range(6):
        place = Place("blk.0.ffn_gate_exps.weight", experts=3, parts=2, index=index)
        stored = row.find(place, (4, COLUMNS), Source(entries.get, NOTHING.__getitem__))
        assert stored is not None
        (part,) = stored.parts
        rows = whole.reshape(-1)[part.offset : part.offset + part.nbytes].reshape(part.shape)
        np.testing.assert_allclose(row.decode(stored, [rows]), expected[index], rtol=0, atol=1e-5)


def test_the_table_of_types_is_ggmls() -> None:
    assert {number: (t.name, t.elements, t.nbytes) for number, t in TYPES.items()} == {
        t.value: (t.name, *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType
    }
    for row in GGUF:
        assert (row.elements, row.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[row.stored]]
        assert FORMATS[row.name] is row
