"""A KV cache in int8: what is written, what attention makes of it in float64, and that company changes nothing."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from backends import BEST, HERE, RandomWeights, open_backend
from chunks import SHAPES, WHOLE, Chunks, in_pieces

from moe_ray.engine.kv_cache import KVCache
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.trunk import NativeTrunk
from moe_ray.model.compute.torch.kv_rows import rounded
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.kv_bytes import kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.moe import Routed

TOLERANCE = {"float32": (1e-4, 2e-3), "float16": (1e-3, 5e-3), "bfloat16": (2e-2, 4e-2)}
"""Of the largest value, per dtype of the rows: after the attention of layer 0, and of logits. A code near a tie may be
the next one."""
NAMES = [
    "native float32",
    "native bfloat16",
    "native float16",
    *(f"{name} bfloat16" for name in HERE if name != BEST),
    "torch float32",
]
CHOSEN = [SHAPES[i] for i in (0, 1, 2, 4, 5, 8, 9)]
shapes = pytest.mark.parametrize(
    "config", CHOSEN, ids=lambda c: f"{c.num_attention_heads}/{c.num_key_value_heads}x{c.head_dim}"
)


@pytest.fixture(scope="module", params=NAMES)
def compute(request: pytest.FixtureRequest) -> Compute:
    return open_backend(request.param)


def chunks_of(compute: Compute, config: ModelConfig) -> Chunks:
    return Chunks(compute, config, kv_cache_dtype="int8")


@cache
def in_float64(shape: int) -> tuple[Chunks, torch.Tensor, list[Routed]]:
    """torch, in float64: rounds keys and values by code of its own, and attends to what the codes say."""
    config = SHAPES[shape]
    trunk = TorchTrunk(RandomWeights(config, torch.float64), 256)  # type: ignore[arg-type]
    chunks = Chunks(open_backend("torch float32"), config, kv_cache_dtype="int8", trunk=trunk)
    return chunks, *chunks.run(WHOLE)


@shapes
def test_a_trunk_is_right(config: ModelConfig, compute: Compute) -> None:
    exact, expected, reference = in_float64(SHAPES.index(config))
    ours = chunks_of(compute, config)
    got, routings = ours.run(WHOLE)
    exact_rows, exact_logits = TOLERANCE[compute.dtype]
    mine, theirs = ours.cache.layer(0), exact.cache.layer(0)  # of layer 0: no router has chosen yet
    for codes, wanted in ((mine.k, theirs.k), (mine.v, theirs.v)):
        assert codes.dtype == torch.int8
        assert int(codes.int().abs().max()) == 127
        off = (codes.int() - wanted.int()).abs()
        assert int(off.max()) <= (1 if compute.dtype == "float32" else 2)
        assert (off > 0).float().mean() < (1e-3 if compute.dtype == "float32" else 0.2)
    for scales, wanted in ((mine.k_scales, theirs.k_scales), (mine.v_scales, theirs.v_scales)):
        assert scales is not None
        torch.testing.assert_close(scales, wanted, rtol=exact_rows, atol=0)
    assert got.dtype == torch.float32
    # A token that rounding sends to another expert has other values from there on: judge by the bulk.
    rows = [routing.rows[routing.row_of[:, 0].long()] for routing in (routings[0], reference[0])]
    for one, other, allowed in ((rows[0].double(), rows[1], exact_rows), (got, expected, exact_logits)):
        error = (one - other).abs().amax(-1) / other.abs().amax(-1)
        assert error.median() < allowed
        assert error.quantile(0.9) < 10 * allowed


@shapes
def test_chunks_and_company_change_nothing(config: ModelConfig, compute: Compute) -> None:
    """The same tokens in chunks, behind what is cached, in other company and order."""
    got, _ = chunks_of(compute, config).run(WHOLE)
    chunks = chunks_of(compute, config)
    again = in_pieces(chunks)
    if compute.kernels is not None:
        assert torch.equal(again, got)
    else:
        error = (again - got).abs().amax(-1) / got.abs().amax(-1)
        assert error.median() < TOLERANCE[compute.dtype][1]
        assert error.quantile(0.9) < 5 * TOLERANCE[compute.dtype][1]


@shapes
def test_threads_change_nothing(config: ModelConfig) -> None:
    runs = [chunks_of(open_backend("native bfloat16", threads), config).run(WHOLE)[0] for threads in (1, 3)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(runs))


class OddWeights(RandomWeights):
    """Token 5 is not a number, token 6 infinite, token 7 all zeros."""

    def embed(self) -> torch.Tensor:
        rows = super().embed()
        rows[5], rows[6], rows[7] = torch.nan, torch.inf, 0.0
        return rows


@pytest.mark.parametrize("odd", [5, 6, 7])
def test_what_is_no_number_is_told_and_zeros_are_zeros(compute: Compute, odd: int) -> None:
    """To those who see it, and to nobody else."""
    config = SHAPES[0]
    weights = OddWeights(config, compute.torch_dtype)
    trunk = (
        TorchTrunk(weights, 256)  # type: ignore[arg-type]
        if compute.kernels is None
        else NativeTrunk(weights, 256, compute.kernels, compute.dtype)  # type: ignore[arg-type]
    )
    chunks = Chunks(compute, config, kv_cache_dtype="int8", trunk=trunk)
    with_odd, without = [8, 9, odd, 10, 11], [8, 9, 12, 10, 11]
    got, _ = chunks.run([(0, with_odd, 0, 5), (1, without, 0, 5)])
    if compute.kernels is not None:  # torch multiplies what is masked by zero
        assert bool(got[:2].isfinite().all())
    assert bool(got[5:].isfinite().all())
    if odd == 7:
        assert bool(got.isfinite().all())
        held = chunks.cache.layer(0)
        slot = 3 * chunks.block_size + 2  # position 2 of sequence 0
        assert not bool(held.k[slot].any())
        assert held.k_scales is not None
        assert not bool(held.k_scales[slot].any())
    else:
        assert bool(got[2:5].isnan().all())


def test_rounding_of_torch() -> None:
    rows = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(0)) * 3
    rows[2] = 0.0
    codes, scales = rounded(rows)
    values = codes.float() * scales[..., None]
    assert bool(((values - rows).abs() <= 0.5001 * scales[..., None]).all())
    np.testing.assert_array_equal(codes.abs().amax(-1), np.where(rows.any(-1), 127, 0))


@pytest.mark.parametrize("config", SHAPES[:3], ids=lambda c: f"x{c.head_dim}")
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_bytes_are_counted_right(config: ModelConfig, dtype: str) -> None:
    cache = KVCache(config, 10, 16, getattr(torch, dtype), torch.device("cpu"))
    assert cache.nbytes == (10 * 16 + 1) * kv_bytes_per_token(config, dtype)
