"""What weights may be held as: bytes of real shapes, groups that fit a row, NF4's levels by their definition."""

from __future__ import annotations

from statistics import NormalDist

import pytest

from moe_ray.errors import ConfigError
from moe_ray.model.formats import FORMATS
from moe_ray.model.formats.grouped import MIDDLE
from moe_ray.model.formats.held import GROUPINGS, QUANTIZATIONS, HeldAs, grouping, nbytes
from moe_ray.model.formats.rounding import NF4


def test_each_quantisation_has_a_grouping() -> None:
    assert tuple(GROUPINGS) == QUANTIZATIONS
    assert not GROUPINGS.keys() & FORMATS.keys()
    for how in GROUPINGS.values():
        assert how.bits in MIDDLE
        assert how.levels is None or len(how.levels) == 2**how.bits


def test_nf4_levels_are_the_quantiles_of_their_definition() -> None:
    """bitsandbytes' `create_normal_map`: quantiles of 8 steps above zero and of 7 below, scaled to 1 (QLoRA, 3)."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    levels = sorted([*above, 0.0, *below])
    assert [level / max(above) for level in levels] == pytest.approx(NF4, abs=2e-7)


@pytest.mark.parametrize(
    ("name", "inputs", "group"),
    [("int8", 4096, 128), ("int8", 576, 64), ("int8", 96, 32), ("int8", 80, 80), ("int4", 48, 48), ("nf4", 1536, 64)],
)
def test_a_group_divides_its_row(name: str, inputs: int, group: int) -> None:
    how = grouping(name, inputs)
    assert how is not None
    assert how.group == group


def test_bytes_of_a_matrix_of_mixtral() -> None:
    shape = (14336, 4096)
    weights = 14336 * 4096
    assert nbytes("float32", shape) == 4 * weights
    assert nbytes("bfloat16", shape) == 2 * weights
    assert nbytes("int8", shape) == weights + 2 * weights // 128
    assert nbytes("int4", shape) == weights // 2 + 2 * weights // 32
    assert nbytes("nf4", shape) == weights // 2 + 2 * weights // 64


def test_gates_norms_and_embeddings_stay_floats() -> None:
    held = HeldAs("bfloat16", "int4")
    assert {held.of(role) for role in ("embed", "input_norm", "post_norm", "norm", "router")} == {"bfloat16"}
    assert {held.of(role) for role in ("q", "k", "v", "out", "head", "gate", "up", "down")} == {"int4"}
    assert HeldAs("float32").of("down") == "float32"


def test_other_names_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'int3', allowed: float32, .*, int8, int4, nf4"):
        grouping("int3", 64)
