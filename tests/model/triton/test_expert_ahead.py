"""Experts of Mixtral-8x7B compile for every card: within its shared memory and registers, and with its tensor cores."""

from __future__ import annotations

from typing import Any

import pytest
from ahead import HALVES, LIKE_80, SHARED_KIB, compiled, shared_bytes
from expert_launches import HELD

from moe_ray.model.compute.triton.products import FEWER_BLOCKS, ROW_BLOCKS

TURING = 75
"""Without bfloat16, and without tensor cores in Triton: the resolver prefers torch there, and says so."""
FEW, MANY = 1, 64
"""Rows: of a program that computes one block of them, and of one that computes several."""
ALL = [
    *(f"{held} bfloat16 {count}" for held in HELD for count in (FEW, MANY)),
    *(f"{held} float16 {FEW}" for held in HELD),
    *(f"{held} float16 {MANY}" for held in ("floats", "int4", "fp8", "awq")),
    *(f"{held} float32 {FEW}" for held in ("floats", "int4", "nf4")),
    f"int4 bfloat16 {MANY} adapter",
]
PART = [f"{held} bfloat16 {count}" for held in ("floats", "int4", "fp8", "awq") for count in (FEW, MANY)]
STACK = 8
"""Bytes that ptxas sets aside in some kernels of few registers, too: no spilled sums."""
OF_TURING = [name for name in ALL if "bfloat16" not in name and str(FEW) in name.split()]
"""Programs have one block of rows there."""


def check(capability: int, names: list[str]) -> None:
    rows = compiled("expert_launches", capability, names)
    assert {row["name"] for row in rows} == set(names)
    for row in rows:
        assert row["shared"] <= shared_bytes(capability), row
        if row["kernel"] != "finish_kernel" and "float32" not in row["name"]:
            assert (row["instruction"] is None) == (capability == TURING), row
        if capability != TURING:
            assert row["stack"] <= STACK, row
    check_blocks_of_rows(rows)


def check_blocks_of_rows(rows: list[dict[str, Any]]) -> None:
    """Several blocks of rows take each instruction of one block just as often as there are blocks.

    So they have the same instructions, of the same shape, and nothing but the code says what is rounded once.
    """
    of_few = {(row["name"], row["kernel"]): row for row in rows}
    for row in rows:
        held, dtype, count, *more = row["name"].split()
        if count == str(MANY) and not more and row["kernel"] != "finish_kernel":
            one = of_few[f"{held} {dtype} {FEW}", row["kernel"]]
            assert one["row_blocks"] == 1
            assert row["row_blocks"] in (ROW_BLOCKS, FEWER_BLOCKS)
            operations = {what: number * row["row_blocks"] for what, number in one["operations"].items()}
            assert row["operations"] == operations, row


def test_a_card() -> None:
    check(86, [f"int4 bfloat16 {FEW}", f"int4 bfloat16 {MANY}"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_all_cards(capability: int) -> None:
    if capability == TURING:
        check(capability, OF_TURING)
    elif capability in LIKE_80:
        check(capability, PART)
    else:
        check(capability, [name for name in ALL if capability in HALVES or "float16" not in name.split()])
