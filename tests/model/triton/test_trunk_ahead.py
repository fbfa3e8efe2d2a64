"""A trunk of Mixtral-8x7B's shapes compiles for every card: within its shared memory, and with its tensor cores."""

from __future__ import annotations

import pytest
from ahead import HALVES, LIKE_80, SHARED_KIB, compiled, shared_bytes
from trunk_launches import STEPS, launches

from moe_ray.model.compute.triton.launch import Launch

TURING = 75
"""Without bfloat16, and without tensor cores in Triton: the resolver prefers torch there, and says so."""
PRODUCTS = {"linear_kernel", "attend_kernel"}
OTHERS = {"rope_kernel", "merge_kernel", "add_norm_kernel", "added_kernel", "choose_kernel", "rank_kernel"} | {
    *("place_kernel", "combine_kernel"),
}
ALL = [
    *(f"mixtral {dtype} auto {step}" for dtype in ("bfloat16", "float16") for step in ("one", "many", "prompt")),
    *(f"mixtral {dtype} {cache} one" for dtype in ("bfloat16", "float16") for cache in ("int8", "fp8")),
    *(f"{model} {dtype} auto one" for model in ("window", "gpt-oss", "qwen3") for dtype in ("bfloat16", "float16")),
    "mixtral bfloat16 auto short",
    "wide bfloat16 auto one",
    "wide bfloat16 int8 one",
    "wide float32 auto one",
    "mixtral float32 auto one",
    "mixtral float32 int8 prompt",
]
PART = [f"mixtral bfloat16 {step}" for step in ("auto one", "auto many", "auto prompt", "int8 one", "fp8 one")]


def check(capability: int, names: list[str]) -> None:
    rows = compiled("trunk_launches", capability, names)
    assert {row["name"] for row in rows} == set(names)
    instructions = set()
    for row in rows:
        assert row["shared"] <= shared_bytes(capability), row
        if row["kernel"] in PRODUCTS and "float32" not in row["name"]:
            assert (row["instruction"] is None) == (capability == TURING), row
            instructions.add(row["instruction"])
    assert len(instructions) <= 1, f"the same for all numbers of rows, found {instructions}"


def test_a_step_launches_every_kernel() -> None:
    assert {each.kernel.__name__ for each in launches("mixtral bfloat16 auto one")} == PRODUCTS | OTHERS
    more = {each.kernel.__name__ for each in launches("qwen3 bfloat16 auto one")}
    assert more == PRODUCTS | OTHERS | {"head_norm_kernel"}


@pytest.mark.parametrize("kind", ["mixtral bfloat16 auto", "mixtral float16 int8", "gpt-oss bfloat16 fp8"])
def test_no_step_launches_what_was_not_compiled_before(kind: str) -> None:
    """Of constants, types and what is left out Triton compiles a kernel for each; numbers change none."""

    def compiled_for(each: Launch) -> tuple[str, ...]:
        kinds = {name: None if tensor is None else tensor.dtype for name, tensor in each.tensors.items()}
        return (
            each.kernel.__name__,
            str(sorted(each.constants.items())),
            str(sorted(kinds.items())),
            str(each.options()),
        )

    warmed = {compiled_for(each) for each in launches(f"{kind} warming")}
    for step in STEPS:
        assert {compiled_for(each) for each in launches(f"{kind} {step}")} <= warmed, step


@pytest.mark.parametrize(("capability", "name"), [(86, "mixtral bfloat16 auto one")])
def test_a_card(capability: int, name: str) -> None:
    check(capability, [name])


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_all_cards(capability: int) -> None:
    if capability in LIKE_80:
        check(capability, PART)
        return
    left_out = {"bfloat16", "wide"} if capability == TURING else set() if capability in HALVES else {"float16"}
    check(capability, [name for name in ALL if not left_out & set(name.split())])
