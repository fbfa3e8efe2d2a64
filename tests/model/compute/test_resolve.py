"""What computes a model, on machines of every kind: plain values in, a backend or an error out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.compute.resolve import Backend, Machine, TritonHere, Wanted, choose_dtype, resolve
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.build import KERNELS

OLD, AVX2 = frozenset({"sse4_2", "avx"}), frozenset({"avx2", "fma", "f16c"})
ARM = frozenset({"asimd", "asimddp", "bf16"})
AVX512_BF16 = KERNELS["avx512_bf16"].needs


def card(capability: tuple[int, int] | None = (8, 0), triton: TritonHere = "compiles") -> Machine:
    return Machine(AVX512_BF16, cuda=True, capability=capability, triton=triton)


def native(dtype: str, kernels: str) -> Backend:
    return Backend(dtype, "cpu", "native", "native", kernels)


def model(**changes: Any) -> ModelConfig:
    raw = {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "torch_dtype": "bfloat16",
    }
    return ModelConfig.from_dict({**raw, **changes})


@pytest.mark.parametrize(
    ("wanted", "stored", "device", "flags", "kernels", "chosen"),
    [
        ("auto", "bfloat16", "cpu", AVX512_BF16, "avx512_bf16", "bfloat16"),
        ("auto", "bfloat16", "cpu", AVX512_BF16, None, "bfloat16"),
        ("auto", "bfloat16", "cpu", frozenset({"amx_tile"}), None, "bfloat16"),
        ("auto", "float16", "cpu", AVX512_BF16, "avx512_bf16", "bfloat16"),
        ("auto", "float16", "cpu", AVX2, "avx2", "float16"),
        ("auto", "float32", "cpu", AVX512_BF16, "avx512_bf16", "float32"),
        ("auto", "bfloat16", "cpu", AVX2, "avx2", "bfloat16"),
        ("auto", "bfloat16", "cpu", AVX2, None, "float32"),
        ("auto", "bfloat16", "cpu", ARM, "neon_dotprod", "bfloat16"),
        ("auto", "bfloat16", "cpu", frozenset(), None, "float32"),
        ("bfloat16", "float32", "cpu", AVX2, "avx2", "bfloat16"),
        ("auto", "bfloat16", "cuda", AVX2, None, "bfloat16"),
        ("auto", "float16", "cuda", frozenset(), None, "float16"),
        ("float32", "int3", "cpu", AVX2, "avx2", "float32"),
    ],
)
def test_dtype(wanted: str, stored: str, device: str, flags: frozenset[str], kernels: str | None, chosen: str) -> None:
    assert choose_dtype(wanted, stored, device, flags, kernels) == chosen


def test_a_dtype_that_is_not_known() -> None:
    with pytest.raises(CheckpointError, match=r"dtype 'int3', supported: float32, bfloat16, float16"):
        choose_dtype("auto", "int3", "cuda", AVX512_BF16, None)


@pytest.mark.parametrize(
    ("changes", "wanted", "machine", "backend"),
    [
        ({}, Wanted(), Machine(AVX512_BF16), native("bfloat16", "avx512_bf16")),
        ({}, Wanted(kernels="native"), Machine(AVX512_BF16), native("bfloat16", "avx512_bf16")),
        ({}, Wanted(kernels="avx2"), Machine(AVX512_BF16), native("bfloat16", "avx2")),
        ({}, Wanted(), Machine(AVX2), native("bfloat16", "avx2")),
        ({}, Wanted(quantize="int4"), Machine(AVX2), native("bfloat16", "avx2")),
        ({"torch_dtype": "float16"}, Wanted(), Machine(AVX2), native("float16", "avx2")),
        ({}, Wanted("float32"), Machine(AVX2 | {"avx_vnni"}), native("float32", "avx_vnni")),
        ({}, Wanted(), Machine(ARM, architecture="aarch64"), native("bfloat16", "neon_dotprod")),
        ({}, Wanted(), Machine(frozenset({"asimd"}), architecture="aarch64"), native("bfloat16", "neon")),
        ({}, Wanted(kernels="torch"), Machine(AVX512_BF16), Backend("bfloat16")),
        ({}, Wanted(kernels="torch"), Machine(AVX2), Backend("float32")),
        ({}, Wanted(kernels="torch"), card(), Backend("bfloat16", "cuda", graphs=True)),
        ({}, Wanted(kernels="torch", enforce_eager=True), card(), Backend("bfloat16", "cuda")),
        ({}, Wanted(device="cpu"), card(), native("bfloat16", "avx512_bf16")),
    ],
)
def test_what_is_chosen(changes: dict[str, Any], wanted: Wanted, machine: Machine, backend: Backend) -> None:
    assert resolve(model(**changes), wanted, machine) == backend


@pytest.mark.parametrize(
    ("changes", "wanted", "flags", "trunk", "experts", "missing"),
    [
        ({}, Wanted(), OLD, "torch", "torch", "this CPU has no avx2, f16c, fma instructions"),
        (
            {"head_dim": 48},
            Wanted(),
            AVX512_BF16,
            "torch",
            "native",
            "trunk: no attention for head_dim 48 with 2 query heads per KV head",
        ),
        (
            {"num_attention_heads": 18},
            Wanted(),
            AVX512_BF16,
            "torch",
            "native",
            "trunk: no attention for head_dim 64 with 9 query heads per KV head",
        ),
        (
            {"hidden_act": "gelu"},
            Wanted(),
            AVX512_BF16,
            "native",
            "torch",
            "experts: native kernels compute silu, not gelu",
        ),
        (
            {"intermediate_size": 112},
            Wanted(),
            AVX512_BF16,
            "native",
            "torch",
            "experts: intermediate_size 112 is not a multiple of 32",
        ),
        ({"hidden_size": 80}, Wanted(), AVX512_BF16, "torch", "torch", "trunk: hidden_size 80 is not a multiple of 32"),
    ],
)
def test_what_runs_on_the_reference_says_why(
    changes: dict[str, Any], wanted: Wanted, flags: frozenset[str], trunk: str, experts: str, missing: str
) -> None:
    backend = resolve(model(**changes), wanted, Machine(flags))
    assert (backend.trunk, backend.experts) == (trunk, experts)
    assert missing in "; ".join(backend.missing)
    asked = Wanted(wanted.dtype, wanted.device, "native")
    with pytest.raises(ConfigError, match=r"model\.kernels is 'native': ") as refused:
        resolve(model(**changes), asked, Machine(flags))
    assert missing in str(refused.value)


@pytest.mark.parametrize("kernels", ["native", "avx2"])
def test_native_kernels_on_a_card_are_refused(kernels: str) -> None:
    with pytest.raises(ConfigError, match="native kernels compute on a CPU, not on CUDA; allowed on a card: auto, "):
        resolve(model(), Wanted(kernels=kernels), card())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0), None])
def test_a_card_computes_experts_by_triton(
    dtype: str, kernels: str, quantize: str | None, capability: tuple[int, int] | None
) -> None:
    backend = resolve(model(torch_dtype=dtype), Wanted(kernels=kernels, quantize=quantize), card(capability))
    assert (backend.dtype, backend.device, backend.experts, backend.notes) == (dtype, "cuda", "triton", ())
    assert not any("experts" in why for why in backend.missing)
    assert not backend.native


OLD_CARD = "this card (compute capability 7.5)"
IN_FLOAT16 = f"float16 stands for bfloat16, for which {OLD_CARD} has no instructions"


@pytest.mark.parametrize(
    ("kernels", "quantize", "experts", "note"),
    [
        ("auto", None, "torch", f"torch computes, on tensor cores, which Triton does not use on {OLD_CARD}"),
        ("auto", "int4", "triton", f"Triton computes without tensor cores on {OLD_CARD}"),
        ("triton", None, "triton", f"Triton computes without tensor cores on {OLD_CARD}"),
        ("torch", None, "torch", ""),
    ],
)
def test_a_card_without_bfloat16(kernels: str, quantize: str | None, experts: str, note: str) -> None:
    """It computes in float16, and by torch, whose products use tensor cores, unless codes are wanted. It says so."""
    backend = resolve(model(), Wanted(kernels=kernels, quantize=quantize), card((7, 5)))
    assert (backend.dtype, backend.experts) == ("float16", experts)
    assert backend.notes == (IN_FLOAT16, *([note] if note else []))
    assert resolve(model(torch_dtype="float32"), Wanted(kernels="torch"), card((7, 5))).notes == ()


def test_bfloat16_that_is_asked_for_runs_on_torch_on_such_a_card() -> None:
    asked = resolve(model(), Wanted("bfloat16"), card((7, 5)))
    assert (asked.dtype, asked.experts) == ("bfloat16", "torch")
    with pytest.raises(ConfigError, match=r"7\.5\) has no instructions for bfloat16"):
        resolve(model(), Wanted("bfloat16", kernels="triton"), card((7, 5)))


@pytest.mark.parametrize(
    ("changes", "machine", "why"),
    [
        ({}, card(triton=""), "Triton is not installed"),
        ({}, card(triton="interprets"), "TRITON_INTERPRET is set, so Triton would not compile"),
        ({"hidden_act": "gelu"}, card(), "experts: Triton's kernels compute silu, not gelu"),
    ],
)
def test_experts_that_triton_does_not_compute_run_on_torch_and_it_says_why(
    changes: dict[str, Any], machine: Machine, why: str
) -> None:
    backend = resolve(model(**changes), Wanted("float32"), machine)
    assert (backend.device, backend.experts) == ("cuda", "torch")
    assert re.search(why, backend.slower_because)
    with pytest.raises(ConfigError, match=f"'triton': .*{why.removeprefix('experts: ')}"):
        resolve(model(**changes), Wanted("float32", kernels="triton"), machine)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, []),
        (
            {"num_attention_heads": 128, "num_key_value_heads": 1, "head_dim": 64},
            ["attention for head_dim 64 with 128"],
        ),
        ({"model_type": "phimoe"}, ["LayerNorm", "SparseMixer"]),
        ({"model_type": "gpt_oss"}, []),
    ],
)
def test_a_trunk_by_triton_says_which_parts_torch_computes(changes: dict[str, Any], parts: list[str]) -> None:
    backend = resolve(model(**changes), Wanted("float32"), card())
    assert backend.trunk == "triton"
    assert len(backend.missing) == len(parts)
    for why, part in zip(backend.missing, parts, strict=True):
        assert why.startswith(f"trunk: torch computes {part}")


def test_cards_that_triton_compiles_nothing_for() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 7\.0\) is older than 7\.5"):
        resolve(model(), Wanted("float16", quantize="int4"), card((7, 0)))


def test_on_a_cpu_triton_is_for_proofs() -> None:
    asked = Wanted(kernels="triton")
    with pytest.raises(ConfigError, match="only in Triton's interpreter, which is for proofs: TRITON_INTERPRET=1"):
        resolve(model(), asked, Machine(AVX2, triton="compiles"))
    with pytest.raises(ConfigError, match="Triton is not installed"):
        resolve(model(), asked, Machine(AVX2))
    backend = resolve(model(), asked, Machine(AVX2, triton="interprets"))
    assert (backend.device, backend.experts) == ("cpu", "triton")
    assert "very slow" in backend.notes[0]
    assert resolve(model(), Wanted(), Machine(AVX2, triton="interprets")) == native("bfloat16", "avx2")


def test_other_machines_than_there_are_kernels_for() -> None:
    assert resolve(model(), Wanted(), Machine(frozenset(), architecture="riscv64")).missing == (
        "there are no native kernels for riscv64",
    )
    with pytest.raises(ConfigError, match=r"'neon': they are for aarch64, this is x86_64"):
        resolve(model(), Wanted(kernels="neon"), Machine(AVX2))
    with pytest.raises(ConfigError, match=r"'avx512': this CPU has no avx512bw, avx512dq, avx512f, avx512vl"):
        resolve(model(), Wanted(kernels="avx512"), Machine(AVX2))


@pytest.mark.parametrize(
    ("changes", "wanted", "machine", "why"),
    [
        ({}, Wanted(kernels="torch", quantize="int4"), Machine(AVX2), r"model\.kernels is 'torch'"),
        ({}, Wanted(quantize="int4"), card(triton=""), "Triton is not installed"),
        ({}, Wanted(kernels="torch", quantize="int4"), card(), r"model\.kernels is 'torch'"),
        ({"hidden_act": "gelu"}, Wanted(quantize="int4"), card(), "experts: Triton's kernels compute silu"),
        ({}, Wanted(quantize="int4"), Machine(OLD), "this CPU has no avx2"),
        ({"hidden_act": "gelu"}, Wanted(quantize="nf4"), Machine(AVX2), "experts: native kernels compute silu"),
    ],
)
def test_nothing_is_quantised_where_torch_computes(
    changes: dict[str, Any], wanted: Wanted, machine: Machine, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"quantize {wanted.quantize}: .*{why}"):
        resolve(model(**changes), wanted, machine)


def test_cuda_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve(model(), Wanted(device="cuda"), Machine(AVX512_BF16))


def test_a_backend_is_said_in_one_line() -> None:
    assert str(resolve(model(), Wanted(), Machine(AVX512_BF16))) == (
        "bfloat16 on cpu, trunk and experts by native avx512_bf16 kernels"
    )
    assert str(resolve(model(), Wanted(), card())).startswith("bfloat16 on cuda, trunk ")
    assert str(resolve(model(), Wanted(), card())).endswith("experts by Triton kernels")
    assert str(resolve(model(hidden_act="gelu"), Wanted(), Machine(AVX2))) == (
        "bfloat16 on cpu, trunk by native avx2 kernels, experts by torch kernels"
    )
