"""The one form between quantised formats and kernels: its values are what its formula says."""

from __future__ import annotations

import numpy as np
import pytest

from moe_ray.model.formats import GroupedCodes, Grouping

N, K, GROUP = 3, 64, 32


def by_the_formula(weight: GroupedCodes) -> np.ndarray:
    how, values = weight.grouping, np.empty(weight.shape, np.float32)
    for n in range(N):
        for j in range(K):
            code, g = int(weight.codes[n, j]), j // how.group
            level = np.float32(how.levels[code] if how.levels else code - {4: 8, 8: 128}[how.bits])
            value = weight.scales[n, g] * level
            if weight.offsets is not None:
                value += weight.offsets[n, g]
            values[n, j if weight.order is None else weight.order[j]] = value
    return values


@pytest.mark.parametrize(
    "grouping",
    [
        Grouping(4, GROUP),
        Grouping(8, GROUP, offsets=True),
        Grouping(4, GROUP, reordered=True),
        Grouping(4, K, levels=tuple(i * i / 10 - 1 for i in range(16))),
    ],
    ids=lambda g: f"{g.bits} bits",
)
def test_values(grouping: Grouping) -> None:
    random = np.random.default_rng(1)
    groups = K // grouping.group
    weight = GroupedCodes(
        grouping,
        random.integers(0, 2**grouping.bits, (N, K)).astype(np.uint8),
        random.random((N, groups), np.float32),
        random.random((N, groups), np.float32) if grouping.offsets else None,
        random.permutation(K).astype(np.int32) if grouping.reordered else None,
    )
    np.testing.assert_array_equal(weight.values(), by_the_formula(weight))


def test_bytes() -> None:
    assert Grouping(4, 32).nbytes((2, 64)) == 64 + 2 * 4
    assert Grouping(8, 64, offsets=True).nbytes((2, 64)) == 128 + 2 * 4
