"""The native kernels against float64, and the promise that a row's result does not depend on rows, chunks, threads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BEST, HERE

from moe_ray.config import load_config
from moe_ray.errors import ConfigError, KernelsUnavailable
from moe_ray.model.compute.compute import open_compute
from moe_ray.model.compute.native.limits import NATIVE
from moe_ray.model.compute.resolve import Wanted
from moe_ray.model.formats import GroupedCodes, Grouping
from moe_ray.model.formats.rounding import NF4, round_to_nearest
from moe_ray.model.matrix import FloatMatrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.native import build
from moe_ray.native.build import KERNELS, shared_library
from moe_ray.native.codes import pack_codes, round_codes
from moe_ray.native.kernels import Kernels, Packed

CACHE = load_config().cache_dir
needs_kernels = pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).bfloat16()


@cache
def opened(name: str, threads: int = 1) -> Kernels:
    return Kernels(CACHE, threads, name)


@pytest.fixture(scope="module", params=HERE or [None])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of each instruction set that this machine has."""
    if request.param is None:
        pytest.skip("no native kernels for this machine")
    return opened(request.param)


def right_for_any_rows(kernels: Kernels, packed: Packed, x: torch.Tensor, exact: torch.Tensor, error: float) -> None:
    """Within `error` of the largest value, and the same for any number of rows and threads."""
    whole = kernels.linear(x, packed)
    assert (whole.double() - exact).abs().max() <= error * exact.abs().max()
    for rows in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 25):
        assert torch.equal(kernels.linear(x[:rows], packed), whole[:rows]), f"{rows} rows"
    assert torch.equal(opened(kernels.name, 3).linear(x, packed), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 64), (200, 96), (1000, 512), (8, 1024)])
def test_linear(kernels: Kernels, n: int, k: int, dtype: str) -> None:
    weight = random(n, k, scale=k**-0.5).to(getattr(torch, dtype))
    packed = kernels.pack_floats(dtype, FloatMatrix(weight).values())
    assert torch.equal(kernels.unpack_rows(packed, torch.arange(n)), weight.float())
    x = random(40, k)
    right_for_any_rows(kernels, packed, x, x.double() @ weight.double().T, 1e-6)


GROUPINGS = [
    Grouping(8, 32),
    Grouping(8, 128),
    Grouping(8, 64, offsets=True),
    Grouping(8, 256),
    Grouping(4, 32),
    Grouping(4, 128, offsets=True),
    Grouping(4, 64, levels=NF4),
    Grouping(4, 32, levels=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)),
    Grouping(4, 32, reordered=True),
    Grouping(8, 128, offsets=True, reordered=True),
]


WIDE = [(grouping, True) for grouping in GROUPINGS if grouping.bits == 8]


@pytest.mark.parametrize(("grouping", "wide_inputs"), [*((each, False) for each in GROUPINGS), *WIDE], ids=str)
def test_linear_of_codes(kernels: Kernels, grouping: Grouping, wide_inputs: bool) -> None:
    n, k = 72, 256
    generator = np.random.default_rng(n)
    groups = k // grouping.group
    weight = GroupedCodes(
        grouping,
        generator.integers(0, 2**grouping.bits, (n, k)).astype(np.uint8),
        (generator.random((n, groups), np.float32) - 0.3).astype(np.float16).astype(np.float32) * 2.0**-14,
        generator.standard_normal((n, groups), np.float32) * 1e-4 if grouping.offsets else None,
        generator.permutation(k).astype(np.int32) if grouping.reordered else None,
    )
    packed = pack_codes(kernels, weight, wide_inputs=wide_inputs)
    values = torch.from_numpy(weight.values())
    unpacked = kernels.unpack_rows(packed, torch.arange(n))
    # Offsets are held in 11 bits, a table's levels as the nearest of 255, unless they are whole multiples of a step.
    inexact = 5e-3 if grouping.levels == NF4 else 5e-4 if grouping.offsets else 1e-7
    assert (unpacked - values).abs().max() <= inexact * values.abs().max()
    x = random(40, k)
    right_for_any_rows(kernels, packed, x, x.double() @ unpacked.double().T, 5e-5 if wide_inputs else 1e-2)


@pytest.mark.parametrize("grouping", [*GROUPINGS[:7]], ids=str)
def test_rounding_is_that_of_the_formats(kernels: Kernels, grouping: Grouping) -> None:
    """The same codes and scales as `round_to_nearest`, but where two of them lose the same."""
    values = random(48, 256, scale=0.05).float().numpy()
    values[3, :128] = 0.0
    codes, scales, offsets = round_codes(kernels, values, grouping)
    wanted = round_to_nearest(values, grouping, search=grouping.levels is None)
    assert (codes == wanted.codes).mean() > 0.995
    np.testing.assert_allclose(scales, wanted.scales, rtol=0, atol=1e-8)
    if offsets is not None and wanted.offsets is not None:
        np.testing.assert_allclose(offsets, wanted.offsets, rtol=1e-6)


def model() -> ModelConfig:
    raw = {"model_type": "mixtral", "vocab_size": 100, "hidden_size": 96, "intermediate_size": 64}
    return ModelConfig.from_dict(
        {**raw, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    )


def test_the_table_of_kernels_is_that_of_the_library(kernels: Kernels) -> None:
    """What `resolve` decides by, without loading anything."""
    for head_dim in (*range(16, 272, 16), 480, 512, 576, 1024, 1056):
        for group in range(1, 34):
            known = head_dim % NATIVE.lanes == 0 and head_dim <= NATIVE.widest_head and group in NATIVE.groups
            assert kernels.supports_attention(2 * group, 2, head_dim) == known, (head_dim, group)


def test_a_machine_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "cpu_flags", lambda: KERNELS["avx2"].needs | KERNELS["neon"].needs)
    for library in build.libraries():
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
        shared_library(KERNELS[BEST or ""], tmp_path)
    left = [path for path in (tmp_path / "native").rglob("*") if path.is_file()]
    assert all(path.suffix == ".lock" for path in left)
