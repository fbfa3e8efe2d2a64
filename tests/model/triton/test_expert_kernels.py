"""Experts by Triton's kernels, in Triton's interpreter: every form of weights, beside float64."""

from __future__ import annotations

import pytest
import torch
from triton_experts import CASES, ROWS, TOLERANCE, Case, CaseExpert

from moe_ray.model.compute.triton import products
from moe_ray.model.compute.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: test_expert_on_card.py computes on it")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    CaseExpert(case, "float32").check(17)
    CaseExpert(case, "bfloat16").check(1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_all_counts_of_rows(case: Case) -> None:
    for dtype in TOLERANCE:
        expert = CaseExpert(case, dtype)
        for count in ROWS:
            expert.check(count)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_alone_and_in_company(case: Case) -> None:
    CaseExpert(case, "bfloat16").check_alone_and_in_company(33)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_in_every_dtype(case: Case) -> None:
    for dtype in TOLERANCE:
        CaseExpert(case, dtype).check_alone_and_in_company(65)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_in_programs_of_any_number_of_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CaseExpert(case, "bfloat16")
    rows, weights = expert.rows(65)
    asked = []

    def of(blocks: int) -> torch.Tensor:
        monkeypatch.setattr(products, "row_blocks_of", lambda weight, count: asked.append(count) or blocks)
        return expert.ffn.forward(rows, weights)

    one = of(1)
    assert torch.equal(of(2), one)
    assert torch.equal(of(4), one)
    assert asked == [65] * 6


def test_many_rows_share_a_program() -> None:
    wide, small = CaseExpert(CASES[0], "bfloat16"), CaseExpert(CASES[0], "float32")
    asymmetric = CaseExpert(
        next(case for case in CASES if case.grouping is not None and case.grouping.offsets), "float16"
    )
    of_13 = [each.weights.w13 for each in (wide, asymmetric, small)]
    assert [products.row_blocks_of(weight, 16) for weight in of_13] == [1, 1, 1]
    assert [products.row_blocks_of(weight, 17) for weight in of_13] == [4, 2, 1]


def test_no_rows() -> None:
    expert = CaseExpert(CASES[0], "float32")
    assert expert.ffn.forward(*expert.rows(0)).shape == (0, CASES[0].hidden)


def test_more_rows_than_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CaseExpert(CASES[0], "float32")
    rows, weights = expert.rows(40)
    whole = expert.ffn.forward(rows, weights)
    monkeypatch.setattr("moe_ray.model.compute.triton.products.MOST_ROWS", 16)
    assert torch.equal(expert.ffn.forward(rows, weights), whole)


def test_rows_that_are_not_contiguous() -> None:
    expert = CaseExpert(CASES[0], "float32")
    rows, weights = expert.rows(10)
    apart = torch.stack((rows, rows), 1).reshape(10, -1)[:, : CASES[0].hidden]
    assert not apart.is_contiguous()
    assert torch.equal(expert.ffn.forward(apart, weights), expert.ffn.forward(rows, weights))
