"""The native kernels against float64, and the promise that a row's result does not depend on rows, chunks, threads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.config import load_config
from moe_ray.errors import ConfigError, KernelsUnavailable
from moe_ray.model.compute.compute import open_compute
from moe_ray.model.compute.resolve import NATIVE, Wanted
from moe_ray.model.model_config import ModelConfig
from moe_ray.native import build
from moe_ray.native.build import KERNELS, shared_library
from moe_ray.native.kernels import Kernels

CACHE = load_config().cache_dir
try:
    shared_library(KERNELS, CACHE)
    WHY_NOT = ""
except KernelsUnavailable as error:
    WHY_NOT = str(error)
needs_kernels = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).bfloat16()


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy()


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(CACHE, 1)


@pytest.fixture(scope="module")
def threaded() -> Kernels:
    return Kernels(CACHE, 3)


@needs_kernels
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 64), (200, 96), (1000, 512), (8, 1024)])
def test_linear(kernels: Kernels, threaded: Kernels, n: int, k: int) -> None:
    weight = random(n, k, scale=k**-0.5)
    packed = kernels.pack(bits(weight))
    assert torch.equal(kernels.unpack_rows(packed, torch.arange(n)), weight.float())
    x = random(40, k)
    exact = x.double() @ weight.double().T
    whole = kernels.linear(x, packed)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 25):
        assert torch.equal(kernels.linear(x[:rows], packed), whole[:rows]), f"{rows} rows"
    assert torch.equal(threaded.linear(x, packed), whole)


def model() -> ModelConfig:
    raw = {"model_type": "mixtral", "vocab_size": 100, "hidden_size": 96, "intermediate_size": 64}
    return ModelConfig.from_dict(
        {**raw, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    )


@needs_kernels
def test_the_table_of_kernels_is_that_of_the_library(kernels: Kernels) -> None:
    """What `resolve` decides by, without loading anything."""
    table = NATIVE[0]
    for head_dim in range(16, 272, 16):
        for group in range(1, 34):
            known = head_dim in table.head_dims and group in table.groups
            assert kernels.supports_attention(2 * group, 2, head_dim) == known, (head_dim, group)


def test_a_machine_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    for library in build.LIBRARIES:
        with pytest.raises(KernelsUnavailable, match="no-such-compiler"):
            shared_library(library, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.kernels is 'native': no C\+\+ compiler found"):
        open_compute(model(), Wanted("bfloat16", "cpu", "native"), tmp_path)
    compute = open_compute(model(), Wanted("bfloat16", "cpu"), tmp_path)
    assert compute.kernels is None
    assert (compute.backend.trunk, compute.backend.experts) == ("torch", "torch")
    assert "no C++ compiler found" in caplog.text


@needs_kernels
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelsUnavailable, match="out of luck"):
        shared_library(KERNELS, tmp_path)
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / "native"))
