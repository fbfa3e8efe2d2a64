"""A KV cache in fp8: what native kernels write and read is what torch's float8_e4m3fn says, to the bit."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import pytest
import torch
from backends import HERE, RandomWeights, open_backend
from chunks import SHAPES, WHOLE, Chunks, in_pieces

from moe_ray.engine.kv_cache import KVCache
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.torch.kv_rows import MOST_FLOAT8, to_float8
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.kv_bytes import kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.kernels import Layer, ModelShape, StepInputs

WIDTH, HEAD = 256, 128
NAMES = ["native float32", "native bfloat16", "native float16", "torch float32", "torch bfloat16"]
TOLERANCE = {"float32": (1e-4, 2e-2), "float16": (2e-2, 5e-2), "bfloat16": (5e-2, 1e-1)}
"""Of the largest value, per dtype of the rows: after the attention of layer 0, and of logits. A code near a tie may be
the next one, which is an eighth of its value away."""


def all_codes() -> torch.Tensor:
    """float32 [256], what each code is worth."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def edges() -> torch.Tensor:
    """Floats at and around every code, every step between two codes, the ends of the range, and at random."""
    codes = all_codes()[:127]
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 480.0, 512.0, 1e5, 3e38])))
    near = [points * (1 + k * 2.0**-23) for k in (-2, -1, 0, 1, 2)]
    small = torch.tensor([0.0, 2.0**-10, 2.0**-11, 1e-30, 1e-40, 2.0**-7, 0.9999 * 2.0**-6])
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    whole = torch.cat((*near, small, noise, noise * 300, noise * 0.003))
    return torch.cat((whole, -whole, torch.tensor([torch.nan, torch.inf, -torch.inf])))


class Native:
    """One layer of native kernels whose values are its biases, and whose attention of one token adds what it read."""

    def __init__(self, name: str) -> None:
        self.kernels = open_backend(name).kernels
        assert self.kernels is not None
        matrices = (np.zeros((3 * WIDTH, WIDTH)), np.eye(WIDTH), np.zeros((1, WIDTH)))
        self.blocks = [self.kernels.pack_floats("float32", each.astype(np.float32)) for each in matrices]
        self.cache = np.zeros((2, 2, WIDTH), np.uint8)  # K, V of two slots
        self.norm = np.ones(WIDTH, np.float32)
        self.rope = np.ones(HEAD, np.float32)

    def write_and_read(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the cache holds of values [256], and what attention sees of it."""
        bias = np.concatenate((np.zeros(2 * WIDTH), values)).astype(np.float32)
        blocks = (block.address for block in self.blocks)
        norm, k, v = self.norm.ctypes.data, self.cache[0].ctypes.data, self.cache[1].ctypes.data
        layer = Layer(norm, norm, *blocks, k, v, qkv_bias=bias.ctypes.data, float8=1)
        zero, start = np.zeros(1, np.int32), np.zeros(1, np.int64)
        at = zero.ctypes.data
        step = StepInputs(1, 16, at, at, at, at, start.ctypes.data, self.rope.ctypes.data)
        shape = ModelShape(WIDTH, 2, 2, HEAD, 1, 1, 1e-5, 1.0, 0, 1.0, 1, 0)
        seen, rows = np.zeros(WIDTH, np.float32), np.empty(WIDTH, np.float32)
        weight, counts, row_of = np.empty(1, np.float32), np.empty(1, np.int64), np.empty(1, np.int32)
        assert self.kernels is not None
        self.kernels.layer_front(
            *(self.kernels.pool, 0, ctypes.byref(shape), ctypes.byref(layer), ctypes.byref(step)),
            *(each.ctypes.data for each in (seen, rows, weight, counts, row_of)),
        )
        return self.cache[1, 0].copy(), seen


@pytest.fixture(params=[f"{name} bfloat16" for name in HERE])
def native(request: pytest.FixtureRequest) -> Native:
    name = request.param
    return Native("native bfloat16" if name.startswith(HERE[0]) else name)


def test_native_kernels_write_what_torch_does(native: Native) -> None:
    values = edges()
    values = torch.nn.functional.pad(values, (0, -len(values) % WIDTH))
    written = [native.write_and_read(part.numpy())[0] for part in torch.split(values, WIDTH)]
    expected = to_float8(values).view(torch.uint8)
    expected[(values == 0) & values.signbit()] = 0  # a bias of -0 is added to 0
    np.testing.assert_array_equal(np.concatenate(written), expected.numpy())


def test_native_kernels_read_what_torch_does(native: Native) -> None:
    values = all_codes()
    values[values.isnan()] = 0.0
    codes, seen = native.write_and_read(values.numpy())
    np.testing.assert_array_equal(seen, values.numpy())
    nans = np.flatnonzero(all_codes().isnan().numpy())
    np.testing.assert_array_equal(nans, [0x7F, 0xFF])
    wanted = np.delete(np.arange(256), [*nans, 0x80])
    np.testing.assert_array_equal(np.delete(codes, [*nans, 0x80]), wanted)
    odd = np.zeros(WIDTH, np.float32)
    for value in (np.nan, np.inf, -np.inf):
        odd[3] = value
        codes, seen = native.write_and_read(odd)
        assert codes[3] == 0x7F
        assert np.isnan(seen).all(), "by the products of the matrix behind it"


def test_rounding_of_torch() -> None:
    """Nearest, ties to even, at most 448; what is not finite is no number, not even a large one."""
    values = edges()
    got = to_float8(values).float()
    assert torch.equal(got.isnan(), ~values.isfinite())
    finite = values.isfinite()
    got, values = got[finite].double(), values[finite].double().clamp(-MOST_FLOAT8, MOST_FLOAT8)
    codes = all_codes()[:127].double()
    at = torch.searchsorted(codes, values.abs()).clamp(max=126)
    below, above = codes[(at - 1).clamp(min=0)], codes[at]
    middle, even = (below + above) / 2, (at - 1) % 2 == 0
    nearest = torch.where((values.abs() < middle) | ((values.abs() == middle) & even), below, above)
    assert torch.equal(got, nearest.copysign(values))
    assert torch.equal(to_float8(all_codes()).view(torch.uint8)[:127], torch.arange(127, dtype=torch.uint8))


@pytest.fixture(scope="module", params=NAMES)
def compute(request: pytest.FixtureRequest) -> Compute:
    return open_backend(request.param)


@cache
def in_float64(shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    trunk = TorchTrunk(RandomWeights(SHAPES[shape], torch.float64), 256)  # type: ignore[arg-type]
    chunks = Chunks(open_backend("torch float32"), SHAPES[shape], kv_cache_dtype="fp8", trunk=trunk)
    logits, routings = chunks.run(WHOLE)
    return logits, routings[0].rows[routings[0].row_of[:, 0].long()]


@pytest.mark.parametrize("config", [SHAPES[i] for i in (1, 3, 5, 9)], ids=lambda c: f"x{c.head_dim}")
def test_a_trunk_is_right_whole_and_in_chunks(config: ModelConfig, compute: Compute) -> None:
    expected, rows = in_float64(SHAPES.index(config))
    whole = Chunks(compute, config, kv_cache_dtype="fp8")
    got, routings = whole.run(WHOLE)
    assert whole.cache.layer(0).k.dtype == torch.float8_e4m3fn
    mine = routings[0].rows[routings[0].row_of[:, 0].long()]
    for one, other, allowed in zip((mine.double(), got), (rows, expected), TOLERANCE[compute.dtype], strict=True):
        error = (one - other).abs().amax(-1) / other.abs().amax(-1)
        assert error.median() < allowed
    chunks = Chunks(compute, config, kv_cache_dtype="fp8")
    again = in_pieces(chunks)
    if compute.kernels is not None:
        assert torch.equal(again, got)
    else:
        error = (again - got).abs().amax(-1) / got.abs().amax(-1)
        assert error.median() < TOLERANCE[compute.dtype][1]


def test_half_of_the_bytes_of_bfloat16() -> None:
    config = SHAPES[0]
    assert 2 * kv_bytes_per_token(config, "fp8") == kv_bytes_per_token(config, "bfloat16")
    cache = KVCache(config, 10, 16, torch.float8_e4m3fn, torch.device("cpu"))
    assert cache.nbytes == (10 * 16 + 1) * kv_bytes_per_token(config, "fp8")
