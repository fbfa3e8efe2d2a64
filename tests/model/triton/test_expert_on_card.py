"""The cases of the interpreter on a card: what it computes there, and that a row has the same bits in any company."""

from __future__ import annotations

import pytest
from triton_experts import CASES, ROWS, Case, CaseExpert

from moe_ray.model.compute.compute import capability, has_cuda
from moe_ray.model.compute.resolve import BFLOAT16_CARDS
from moe_ray.model.compute.triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda() or INTERPRETED, reason="needs a CUDA device, and no TRITON_INTERPRET"),
]


def dtypes() -> list[str]:
    return ["float32", "float16", *(["bfloat16"] if capability() >= BFLOAT16_CARDS else [])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    for dtype in dtypes():
        expert = CaseExpert(case, dtype, "cuda")
        for count in ROWS:
            expert.check(count)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_alone_and_in_company(case: Case) -> None:
    for dtype in dtypes():
        CaseExpert(case, dtype, "cuda").check_alone_and_in_company(65)
