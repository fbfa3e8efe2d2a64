"""One contract for every backend: the right values, whatever is computed beside them, in whatever order and chunks."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from backends import BACKENDS, BEST, HERE, ffn_of, open_backend, random
from chunks import ONE, SHAPES, TWO, WHOLE, Chunks

from moe_ray.model.compute.base import FFN
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.torch.device_calls import DeviceCalls
from moe_ray.model.compute.torch.hosted import tensor_entry
from moe_ray.model.formats import GroupedCodes
from moe_ray.model.formats.held import grouping, nbytes
from moe_ray.model.matrix import FloatMatrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.native.codes import round_codes
from moe_ray.native.host import HostEntry

TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""Of the largest value, per dtype."""


QUANTISED_TOLERANCE = 3e-2
"""Of inputs as integers of 8 bits, beside weights that are what their codes say."""
VARIANTS = [
    *((name, None) for name in BACKENDS),
    *(("native bfloat16", quantize) for quantize in ("int8", "int4", "nf4")),
    *((f"{name} bfloat16", quantize) for name in HERE if name != BEST for quantize in ("int8", "int4", "nf4")),
    ("native float32", "int4"),
]
"""Backend, and what weights are quantised to."""


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: " ".join(filter(None, v)))
def variant(request: pytest.FixtureRequest) -> tuple[str, str | None]:
    name, quantize = request.param
    return name, quantize


@pytest.fixture(scope="module")
def compute(variant: tuple[str, str | None]) -> Compute:
    return open_backend(variant[0])


@pytest.fixture(scope="module")
def quantize(variant: tuple[str, str | None]) -> str | None:
    return variant[1]


def same(got: torch.Tensor, wanted: torch.Tensor, compute: Compute) -> None:
    """The same bits from native kernels; torch's products round differently for another number of rows."""
    if compute.kernels is not None:
        assert torch.equal(got, wanted)
    else:
        tolerance = TOLERANCE[compute.dtype] * float(wanted.float().abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


# ---- experts


def held_values(weight: torch.Tensor, compute: Compute, quantize: str | None) -> torch.Tensor:
    """What a weight's values are once it is held, in float64."""
    how = None if quantize is None else grouping(quantize, weight.shape[1])
    if how is None or compute.kernels is None:
        return weight.double()
    codes, scales, offsets = round_codes(compute.kernels, FloatMatrix(weight).values(), how)
    return torch.from_numpy(GroupedCodes(how, codes, scales, offsets).values()).double()


class Expert:
    """A random expert, and what it gives in float64."""

    def __init__(self, hidden: int, inner: int, compute: Compute, quantize: str | None = None) -> None:
        self.hidden, self.compute = hidden, compute
        w1, w3 = (random(inner, hidden, scale=hidden**-0.5, seed=i) for i in range(2))
        w2 = random(hidden, inner, scale=inner**-0.5)
        self.ffn: FFN = ffn_of(compute, w1, w3, w2, quantize)
        self.w1, self.w3, self.w2 = (held_values(each, compute, quantize) for each in (w1, w3, w2))
        self.tolerance = TOLERANCE[compute.dtype] if quantize is None else QUANTISED_TOLERANCE
        self.nbytes = sum(nbytes(quantize or compute.dtype, tuple(each.shape)) for each in (w1, w3, w2))

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.rand(count, generator=torch.Generator().manual_seed(count))
        return random(count, self.hidden, scale=3.0).to(self.compute.torch_dtype), weights

    def exact(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = x.double() @ self.w1.T, x.double() @ self.w3.T
        return (torch.nn.functional.silu(gate) * up) @ self.w2.T * weights[:, None]


@pytest.fixture(scope="module", params=[(64, 96), (96, 32), (576, 1536)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def expert(request: pytest.FixtureRequest, compute: Compute, quantize: str | None) -> Expert:
    return Expert(*request.param, compute, quantize)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 30, 130])
def test_an_expert_is_right(expert: Expert, compute: Compute, count: int) -> None:
    x, weights = expert.rows(count)
    before = x.clone()
    out = expert.ffn.forward(x, weights)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before), "rows are read only"
    if count:
        exact = expert.exact(x, weights)
        error = (out.double() - exact).abs().max() / exact.abs().max()
        assert error < expert.tolerance


def test_rows_alone_are_rows_in_a_batch(expert: Expert, compute: Compute) -> None:
    x, weights = expert.rows(30)
    out = expert.ffn.forward(x, weights)
    same(torch.cat([expert.ffn.forward(x[i : i + 1], weights[i : i + 1]) for i in range(30)]), out, compute)
    same(expert.ffn.forward(x[::2], weights[::2]), out[::2], compute)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    same(expert.ffn.forward(x[order], weights[order]), out[order], compute)


def test_the_same_call_gives_the_same_bits(expert: Expert) -> None:
    x, weights = expert.rows(13)
    assert torch.equal(expert.ffn.forward(x, weights), expert.ffn.forward(x, weights))


def test_large_values_stay_finite(expert: Expert, compute: Compute) -> None:
    x, weights = expert.rows(5)
    large = x * (30.0 if compute.dtype == "float16" else 1e4)
    assert bool(expert.ffn.forward(large, weights).isfinite().all())
    assert bool((expert.ffn.forward(torch.zeros_like(x), weights) == 0).all())
    assert bool((expert.ffn.forward(x, torch.zeros_like(weights)) == 0).all())


def test_what_an_expert_holds(expert: Expert) -> None:
    assert expert.nbytes <= expert.ffn.nbytes <= expert.nbytes + 1024, "weights, and a header for each block"
    assert sum(len(buffer) for buffer in expert.ffn.buffers()) == expert.ffn.nbytes


@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (576, 1536)])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_an_experts_threads_change_nothing(hidden: int, inner: int, quantize: str | None) -> None:
    """Of native kernels; torch's threads are torch's own matter."""
    one, three = (Expert(hidden, inner, open_backend("native bfloat16", threads), quantize) for threads in (1, 3))
    x, weights = one.rows(30)
    assert torch.equal(one.ffn.forward(x, weights), three.ffn.forward(x, weights))


@pytest.mark.parametrize("count", [1, 30])
def test_what_a_host_calls_is_forward(expert: Expert, compute: Compute, count: int) -> None:
    """By the function and the handle themselves, as C++ calls them."""
    import ctypes

    from moe_ray.native.host import _FORWARD

    native = expert.ffn.entry()
    assert (native is not None) == (compute.kernels is not None)
    entry: HostEntry = native or tensor_entry(
        partial(DeviceCalls(compute, expert.hidden).fill, expert.ffn), compute.torch_dtype
    )
    x, weights = expert.rows(count)
    out, why = torch.full_like(x, 7.0), ctypes.create_string_buffer(512)
    assert entry.function is not None
    function = _FORWARD(entry.function)
    row_bytes = expert.hidden * compute.torch_dtype.itemsize
    addresses = (x.data_ptr(), weights.data_ptr(), count, row_bytes, out.data_ptr(), None, 0, ctypes.addressof(why))
    assert function(entry.handle, *addresses) == 1
    assert torch.equal(out, expert.ffn.forward(x, weights))
    narrow = (*addresses[:3], row_bytes // 2, *addresses[4:])
    assert function(entry.handle, *narrow) == 0
    assert why.value


# ---- trunks


shapes = pytest.mark.parametrize(
    "config", SHAPES, ids=lambda c: f"{c.num_attention_heads}/{c.num_key_value_heads}x{c.head_dim}"
)
LOOSE = {"int8": (3e-2, 0.95), "int4": (0.5, 0.7), "nf4": (0.5, 0.7)}
"""What the trunk is quantised to → the largest median error, and the least share of rows at the same expert."""


@shapes
def test_a_trunk_is_right(config: ModelConfig, compute: Compute, quantize: str | None) -> None:
    expected, reference = Chunks(open_backend("torch float32"), config).run(WHOLE)
    got, routings = Chunks(compute, config, quantize).run(WHOLE)
    # A router of a random model is near many ties, and rounding moves tokens over them.
    allowed, alike_share = (TOLERANCE[compute.dtype], 0.97) if quantize is None else LOOSE[quantize]
    assert got.dtype == torch.float32
    assert bool(got.isfinite().all())
    for theirs, ours in zip(reference, routings, strict=True):
        assert sum(ours.counts) == 103 * config.num_experts_per_tok
        alike = sum(min(a, b) for a, b in zip(theirs.counts, ours.counts, strict=True))
        assert alike >= alike_share * sum(ours.counts), "rounding may move a token near a tie, not more"
        expert_of = torch.repeat_interleave(torch.arange(len(ours.counts)), torch.tensor(ours.counts))
        assert (expert_of[ours.row_of.long()].diff(dim=-1) > 0).all(), "a token's experts ascend"
        torch.testing.assert_close(ours.weights[ours.row_of.long()].sum(-1), torch.ones(103))
    # A token that rounding sends to another expert has other logits from there on: judge by the bulk.
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.median() < allowed
    assert error.quantile(0.9) < 5 * allowed


@shapes
def test_chunks_and_company_change_nothing(config: ModelConfig, compute: Compute, quantize: str | None) -> None:
    """The same tokens in chunks, behind what is cached, in other company and order."""
    got, _ = Chunks(compute, config, quantize).run(WHOLE)
    chunks = Chunks(compute, config, quantize)
    first, _ = chunks.run([(0, ONE, 0, 41)])
    mixed, _ = chunks.run([(1, TWO, 0, 5), (0, ONE, 41, 42)])
    last, _ = chunks.run([(0, ONE, 42, 70), (1, TWO, 5, 33)])
    again = torch.cat((first, mixed[5:], last[:28], mixed[:5], last[28:]))
    if compute.kernels is not None or compute.dtype == "float32":
        same(again, got, compute)
    else:  # a token near a tie goes elsewhere: judge by the bulk
        error = (again - got).abs().amax(-1) / got.abs().amax(-1)
        assert error.median() < TOLERANCE[compute.dtype]
        assert error.quantile(0.9) < 5 * TOLERANCE[compute.dtype]


@shapes
def test_a_trunks_threads_change_nothing(config: ModelConfig) -> None:
    runs = [Chunks(open_backend("native bfloat16", threads), config).run(WHOLE)[0] for threads in (1, 3)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(runs))
