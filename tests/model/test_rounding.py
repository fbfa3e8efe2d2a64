"""Rounding to codes: the nearest ones, found by trying all; bitsandbytes' tables where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_ray.model.formats import GroupedCodes, Grouping
from moe_ray.model.formats.grouped import MIDDLE
from moe_ray.model.formats.rounding import FP4, NF4, nearest, round_to_nearest, values_of

GROUPINGS = [
    Grouping(4, 32),
    Grouping(4, 64, offsets=True),
    Grouping(4, 128, levels=NF4),
    Grouping(4, 64, levels=FP4),
    Grouping(8, 32),
    Grouping(8, 256),
    Grouping(8, 128, offsets=True),
]


def named(grouping: Grouping) -> str:
    kind = "table" if grouping.levels else "offsets" if grouping.offsets else "symmetric"
    return f"{grouping.bits} bits, group {grouping.group}, {kind}"


def some_weight(rows: int = 24, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) + 0.01


def error_of(weight: torch.Tensor, found: GroupedCodes) -> float:
    return float((torch.from_numpy(found.values()) - weight).square().sum())


@pytest.mark.parametrize("grouping", GROUPINGS, ids=named)
@pytest.mark.parametrize("search", [False, True], ids=["absmax", "searched"])
def test_no_other_code_is_nearer(grouping: Grouping, search: bool) -> None:
    weight = some_weight()
    found = round_to_nearest(weight, grouping, search=search)
    error = np.abs(found.values() - weight.numpy())
    for code in range(2**grouping.bits):
        other = GroupedCodes(grouping, np.full_like(found.codes, code), found.scales, found.offsets)
        assert (error <= np.abs(other.values() - weight.numpy()) + 1e-6).all()


@pytest.mark.parametrize("grouping", GROUPINGS, ids=named)
def test_absmax_rounding_is_within_half_a_step_everywhere(grouping: Grouping) -> None:
    weight = some_weight()
    found = round_to_nearest(weight, grouping, search=False)
    levels = np.sort(grouping.levels or np.arange(2.0**grouping.bits))
    half = np.repeat(np.abs(found.scales) * np.diff(levels).max() / 2, grouping.group, axis=1)
    # Rounding the scale to bfloat16 moves the ends by up to 2**-9 of the range; a zero point in codes, by half a step.
    slack = 1 + 2**-8 * 2**grouping.bits + grouping.offsets
    assert (np.abs(found.values() - weight.numpy()) <= half * slack).all()


@pytest.mark.parametrize("grouping", [g for g in GROUPINGS if g.bits == 4], ids=named)
def test_a_search_loses_less(grouping: Grouping) -> None:
    weight = some_weight()
    plain, searched = (error_of(weight, round_to_nearest(weight, grouping, search=search)) for search in (False, True))
    assert searched < 0.96 * plain


def test_a_search_minds_the_importance_of_inputs() -> None:
    weight = some_weight()
    importance = torch.ones(256)
    importance[::32] = 100.0
    grouping = Grouping(4, 32)

    def important(found: GroupedCodes) -> float:
        return float(((torch.from_numpy(found.values()) - weight).square() * importance).sum())

    assert important(round_to_nearest(weight, grouping, importance)) < important(round_to_nearest(weight, grouping))


@pytest.mark.parametrize("grouping", GROUPINGS, ids=named)
def test_what_is_stored_is_exact(grouping: Grouping) -> None:
    """Scales are bfloat16 numbers and zero points are codes: no format has to round them again."""
    found = round_to_nearest(some_weight(), grouping)
    scales = torch.from_numpy(found.scales)
    assert torch.equal(scales, scales.bfloat16().float())
    assert (found.offsets is not None) == grouping.offsets
    if found.offsets is not None:
        zeros = MIDDLE[grouping.bits] - found.offsets / found.scales
        assert np.array_equal(zeros, np.round(zeros))
        assert zeros.min() >= 0
        assert zeros.max() <= 2**grouping.bits - 1


@pytest.mark.parametrize("grouping", GROUPINGS, ids=named)
def test_torch_and_numpy_say_the_same_of_codes(grouping: Grouping) -> None:
    weight = some_weight()
    found = round_to_nearest(weight, grouping)
    scales = torch.from_numpy(found.scales)
    offsets = None if found.offsets is None else torch.from_numpy(found.offsets)
    codes = nearest(weight, scales, offsets, grouping)
    assert np.array_equal(codes.numpy(), found.codes)
    assert np.array_equal(values_of(codes, scales, offsets, grouping).numpy(), found.values())


@pytest.mark.parametrize("grouping", GROUPINGS, ids=named)
def test_zeros_stay_zeros(grouping: Grouping) -> None:
    assert not round_to_nearest(torch.zeros(2, 256), grouping).values().any()


def test_a_bfloat16_array_of_numpy_is_a_weight() -> None:
    import ml_dtypes

    weight = some_weight().bfloat16()
    array = weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found, same = (round_to_nearest(given, Grouping(4, 32)) for given in (array, weight))
    assert np.array_equal(found.values(), same.values())


@pytest.mark.parametrize(("levels", "kind"), [(NF4, "nf4"), (FP4, "fp4")])
def test_tables_are_those_of_bitsandbytes(levels: tuple[float, ...], kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = functional.get_4bit_type(kind, device="cpu").numpy()
    np.testing.assert_allclose(theirs, np.asarray(levels, np.float32), rtol=0, atol=1e-7)
