"""The trunk's operations by Triton's kernels, in Triton's interpreter, beside the reference."""

from __future__ import annotations

import pytest
import torch
import triton_trunks as cases
from triton_trunks import ATTENTION, BATCHES, DTYPES, LONG_BATCHES, Attention, AttentionCase, Chunk

from moe_ray.model import moe
from moe_ray.model.compute.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: test_trunk_on_card.py computes on it")
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dtypes
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 72, 100), (3, 37, 5), (17, 300, 64), (65, 96, 70), (130, 640, 33)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    cases.linear_is_right(rows, inputs, outputs, dtype, bias, "cpu")


@dtypes
@pytest.mark.parametrize(("inputs", "outputs"), [(72, 100), (640, 70)])
def test_a_row_of_a_product_is_the_same_in_company(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    cases.linear_is_the_same_in_company(inputs, outputs, dtype, "cpu")


@dtypes
@pytest.mark.parametrize("width", [64, 100])
def test_norms(width: int, dtype: torch.dtype) -> None:
    cases.norms_are_right(width, dtype, "cpu")


@dtypes
def test_norms_of_heads(dtype: torch.dtype) -> None:
    cases.head_norms_are_right(dtype, "cpu")


@pytest.mark.parametrize("chunks", BATCHES, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: AttentionCase, chunks: list[Chunk]) -> None:
    Attention(case, "cpu").check(chunks)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", LONG_BATCHES, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_over_several_partitions(case: AttentionCase, chunks: list[Chunk]) -> None:
    Attention(case, "cpu").check(chunks)


@pytest.mark.slow
@pytest.mark.parametrize("case", [ATTENTION[i] for i in (0, 4, 5, 8, 11, 12)], ids=str)
def test_attention_is_the_same_in_company(case: AttentionCase) -> None:
    Attention(case, "cpu").check_company()


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "family"),
    [(8, 2, 1, "mixtral"), (8, 2, 37, "mixtral"), (60, 4, 5, "olmoe"), (17, 3, 9, "granitemoe"), (3, 3, 4, "mixtral")],
)
def test_routing(experts: int, top_k: int, tokens: int, family: str) -> None:
    cases.routing_is_right(experts, top_k, tokens, family, "cpu")


def test_all_rows_to_one_expert_and_none_to_others() -> None:
    cases.routing_is_right(8, 1, 40, "mixtral", "cpu", all_to_one=True)


@pytest.mark.slow
def test_more_tokens_than_are_counted_at_a_time() -> None:
    cases.routing_is_right(8, 2, 1100, "mixtral", "cpu")


@pytest.mark.parametrize(("experts", "top_k", "tokens", "padded"), [(8, 2, 5, 8), (6, 3, 1, 4), (5, 1, 4, 4)])
def test_padding_goes_to_no_expert(experts: int, top_k: int, tokens: int, padded: int) -> None:
    cases.padding_is_not_routed(experts, top_k, tokens, padded, "cpu")


def test_of_equal_scores_the_first_expert_is_chosen() -> None:
    """Which torch.topk leaves open; and what is no number is the largest, as to torch."""
    triton, _ = cases.ops(cases.config(num_local_experts=8, num_experts_per_tok=2), "cpu")
    logits = torch.zeros(4, 8)
    logits[1, 5] = 1.0
    logits[2, 6] = torch.nan
    logits[3] = torch.tensor([0.0, 2, 1, 2, 2, 1, 0, 2])
    routed = triton.route(cases.drawn(4, 72), logits, None, None)
    assert moe.experts_of(routed).tolist() == [[0, 1], [0, 5], [0, 1], [1, 3]]
    assert bool(routed.weights[routed.row_of[2]].isnan().all()), "all of a softmax with it is no number"


@dtypes
def test_what_experts_made_is_added_in_their_order(dtype: torch.dtype) -> None:
    of = cases.config(model_type="granitemoe", num_local_experts=6, num_experts_per_tok=3, residual_multiplier=0.22)
    triton, reference = cases.ops(of, "cpu")
    routed = reference.route(cases.drawn(5, 72), cases.drawn(5, 6, seed=1), None, None)
    hidden, rows = cases.drawn(7, 72, dtype=dtype), cases.drawn(15, 72, seed=2, dtype=dtype)
    got = triton.combine(hidden, rows, routed.row_of, None)
    assert torch.equal(got[:5], reference.combine(hidden, rows, routed.row_of, None)[:5])
    assert torch.equal(got[5:], hidden[5:]), "padding stays as it is"
