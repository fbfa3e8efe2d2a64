"""Experts of Mixtral-8x7B compile for every card: within its shared memory, and with its tensor cores."""

from __future__ import annotations

import pytest
from ahead import SHARED_KIB, compiled
from expert_launches import HELD

TURING = 75
"""Without bfloat16, and without tensor cores in Triton: the resolver prefers torch there, and says so."""
ALL = [
    *(f"{held} {dtype}" for held in HELD for dtype in ("bfloat16", "float16")),
    "floats float32",
    "int4 float32",
    "nf4 float32",
    "int4 bfloat16 adapter",
]


def check(capability: int, names: list[str]) -> None:
    rows = compiled("expert_launches", capability, names)
    assert {row["name"] for row in rows} == set(names)
    for row in rows:
        assert row["shared"] <= SHARED_KIB[capability] * 1024, row
        if row["kernel"] != "finish_kernel" and "float32" not in row["name"]:
            assert (row["instruction"] is None) == (capability == TURING), row


def test_a_card() -> None:
    check(86, ["int4 bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_all_cards(capability: int) -> None:
    check(capability, [name for name in ALL if capability != TURING or "bfloat16" not in name])
