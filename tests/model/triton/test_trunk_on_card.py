"""The trunk's operations by Triton's kernels on a card, beside the reference there: the interpreter's cases."""

from __future__ import annotations

import pytest
import torch
import triton_trunks as cases
from triton_trunks import ATTENTION, BATCHES, DTYPES, LONG_BATCHES, Attention, AttentionCase, Chunk

from moe_ray.model.compute.triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="there is no CUDA device"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dtypes
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 4096, 6144), (17, 300, 64), (130, 640, 33), (600, 512, 512)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    cases.linear_is_right(rows, inputs, outputs, dtype, bias, "cuda")


@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(72, 100), (640, 70), (4096, 4096), (4096, 8)])
def test_a_row_of_a_product_is_the_same_in_company(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    cases.linear_is_the_same_in_company(inputs, outputs, dtype, "cuda")


@dtypes
@pytest.mark.parametrize("width", [64, 100, 4096])
def test_norms(width: int, dtype: torch.dtype) -> None:
    cases.norms_are_right(width, dtype, "cuda")
    cases.head_norms_are_right(dtype, "cuda")


@pytest.mark.parametrize("chunks", [*BATCHES, *LONG_BATCHES], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: AttentionCase, chunks: list[Chunk]) -> None:
    Attention(case, "cuda").check(chunks)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_is_the_same_in_company(case: AttentionCase) -> None:
    Attention(case, "cuda").check_company()


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 37), (128, 8, 1100)])
def test_routing(experts: int, top_k: int, tokens: int) -> None:
    cases.routing_is_right(experts, top_k, tokens, "mixtral", "cuda")
