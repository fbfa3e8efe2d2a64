"""What computes a model, on machines of every kind: plain values in, a backend or an error out."""

from __future__ import annotations

from typing import Any

import pytest

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.compute.resolve import Backend, Machine, Wanted, choose_dtype, resolve
from moe_ray.model.model_config import ModelConfig

AVX2, ARM = frozenset({"avx2", "fma"}), frozenset({"asimd", "bf16"})
AVX512_BF16 = frozenset({"avx2", "fma", "avx512f", "avx512_bf16"})


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
    ("wanted", "stored", "device", "flags", "chosen"),
    [
        ("auto", "bfloat16", "cpu", AVX512_BF16, "bfloat16"),
        ("auto", "bfloat16", "cpu", frozenset({"amx_tile"}), "bfloat16"),
        ("auto", "float16", "cpu", AVX512_BF16, "bfloat16"),
        ("auto", "float32", "cpu", AVX512_BF16, "float32"),
        ("auto", "bfloat16", "cpu", AVX2, "float32"),
        ("auto", "bfloat16", "cpu", ARM, "float32"),
        ("auto", "bfloat16", "cpu", frozenset(), "float32"),
        ("bfloat16", "float32", "cpu", AVX2, "bfloat16"),
        ("auto", "bfloat16", "cuda", AVX2, "bfloat16"),
        ("auto", "float16", "cuda", frozenset(), "float16"),
        ("float32", "int3", "cpu", AVX2, "float32"),
    ],
)
def test_dtype(wanted: str, stored: str, device: str, flags: frozenset[str], chosen: str) -> None:
    assert choose_dtype(wanted, stored, device, flags) == chosen


def test_a_dtype_that_is_not_known() -> None:
    with pytest.raises(CheckpointError, match=r"dtype 'int3', supported: float32, bfloat16, float16"):
        choose_dtype("auto", "int3", "cuda", AVX512_BF16)


@pytest.mark.parametrize(
    ("changes", "wanted", "machine", "backend"),
    [
        ({}, Wanted(), Machine(AVX512_BF16), Backend("bfloat16", "cpu", "native", "native")),
        ({}, Wanted(kernels="native"), Machine(AVX512_BF16), Backend("bfloat16", "cpu", "native", "native")),
        ({}, Wanted(kernels="torch"), Machine(AVX512_BF16), Backend("bfloat16")),
        ({}, Wanted(kernels="torch"), Machine(AVX2), Backend("float32")),
        ({}, Wanted(), Machine(AVX2, cuda=True), Backend("bfloat16", "cuda")),
        ({}, Wanted(device="cuda"), Machine(AVX512_BF16, cuda=True), Backend("bfloat16", "cuda")),
        (
            {},
            Wanted(device="cpu"),
            Machine(AVX512_BF16, cuda=True),
            Backend("bfloat16", "cpu", "native", "native"),
        ),
    ],
)
def test_what_is_chosen(changes: dict[str, Any], wanted: Wanted, machine: Machine, backend: Backend) -> None:
    assert resolve(model(**changes), wanted, machine) == backend


@pytest.mark.parametrize(
    ("changes", "wanted", "flags", "trunk", "experts", "missing"),
    [
        ({}, Wanted(), AVX2, "torch", "torch", "not float32 on a CPU; this CPU has no avx512_bf16 instructions"),
        ({}, Wanted("bfloat16"), AVX2, "torch", "torch", "this CPU has no avx512_bf16 instructions"),
        (
            {},
            Wanted("float32"),
            AVX512_BF16,
            "torch",
            "torch",
            "native kernels take bfloat16 on a CPU, not float32 on a CPU",
        ),
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


def test_native_kernels_on_a_card_are_refused() -> None:
    with pytest.raises(ConfigError, match="not bfloat16 on CUDA"):
        resolve(model(), Wanted(kernels="native"), Machine(AVX512_BF16, cuda=True))


def test_a_weight_format_without_kernels() -> None:
    backend = resolve(model(), Wanted(), Machine(AVX512_BF16), "int4")
    assert backend.missing == ("native kernels take weights of format float, not int4",)


def test_cuda_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        resolve(model(), Wanted(device="cuda"), Machine(AVX512_BF16))


def test_a_backend_is_said_in_one_line() -> None:
    assert str(resolve(model(), Wanted(), Machine(AVX512_BF16))) == (
        "bfloat16 on cpu, trunk: native kernels, experts: native kernels"
    )
