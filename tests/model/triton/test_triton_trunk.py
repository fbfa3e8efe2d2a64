"""A whole trunk by Triton's kernels, in the interpreter: beside the reference, in chunks, and padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backends import RandomWeights, open_backend
from chunks import SHAPES, WHOLE, Chunks, in_pieces
from random_families import CASES, save_random_family
from step_batch import step_batch

from moe_ray.engine.kv_cache import KVCache
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.torch.recorded import AFTER
from moe_ray.model.compute.torch.recorders import CallRecorder
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.compute.triton.ops import TritonOps
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk import Trunk, interleave

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here")


def chunks_by_triton(config: ModelConfig, dtype: str, cache: str = "auto", static: bool = False) -> Chunks:
    compute = open_backend(f"torch {dtype}")
    weights, ops = RandomWeights(config, compute.torch_dtype), TritonOps(config, torch.device("cpu"))
    trunk = TorchTrunk(weights, 256, static, ops)  # type: ignore[arg-type]
    return Chunks(compute, config, kv_cache_dtype=cache, trunk=trunk)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "cache"),
    [(1, "float32", "auto"), (3, "float32", "int8"), (9, "float32", "auto"), (1, "bfloat16", "fp8")],
)
def test_chunks_and_company_change_no_bit(shape: int, dtype: str, cache: str) -> None:
    """And logits are the reference's but for rounding."""
    config = SHAPES[shape]
    got, _ = chunks_by_triton(config, dtype, cache).run(WHOLE)
    assert torch.equal(in_pieces(chunks_by_triton(config, dtype, cache)), got)
    wanted, _ = Chunks(open_backend(f"torch {dtype}"), config, kv_cache_dtype=cache).run(WHOLE)
    error = (got - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    assert error.median() < {"float32 auto": 1e-4, "float32 int8": 2e-3, "bfloat16 fp8": 4e-2}[f"{dtype} {cache}"]


@pytest.mark.slow
def test_padding_changes_no_bit() -> None:
    """Decodes of three sequences, padded to four."""
    config = SHAPES[1]
    plain, padded = (chunks_by_triton(config, "float32", static=static) for static in (False, True))
    prompts = [(n, [3 + (5 + n) * i % 91 for i in range(6)], 0, 5) for n in range(3)]
    decodes = [(n, tokens, 5, 6) for n, tokens, _, _ in prompts]
    for chunks in (plain, padded):
        chunks.run(prompts)
    assert torch.equal(padded.run(decodes)[0], plain.run(decodes)[0])


@pytest.mark.slow
def test_replays_of_decodes_change_no_bit() -> None:
    """Three sequences, padded to four, step by step; the launches of a step of another key are not replayed."""
    config, torch_ = SHAPES[1], open_backend("torch float32")
    trunks = [
        TorchTrunk(RandomWeights(config, torch.float32), 256, True, TritonOps(config, torch.device("cpu")), recorder)  # type: ignore[arg-type]
        for recorder in (None, CallRecorder())
    ]
    plain, recorded = (Chunks(torch_, config, trunk=trunk) for trunk in trunks)
    lengths = (2, 3, 9)
    tokens = [[3 + (5 + n) * i % 91 for i in range(20)] for n in range(3)]
    for chunks in (plain, recorded):
        chunks.run([(n, tokens[n], 0, length) for n, length in enumerate(lengths)])
    for turn in range(AFTER + 2):
        decodes = [(n, tokens[n], length + turn, length + turn + 1) for n, length in enumerate(lengths)]
        assert torch.equal(recorded.run(decodes)[0], plain.run(decodes)[0])
    (lane,) = trunks[1]._recordings.lanes  # type: ignore[union-attr]
    assert [len(each._parts) for each in lane.kept.values()] == [config.num_hidden_layers + 1]


@torch.inference_mode()
def logits_of(directory: Path, backend: Backend) -> list[torch.Tensor]:
    """Of a chunk beside another, and of what follows it."""
    checkpoint = Checkpoint.open(directory)
    experts = local_experts(checkpoint, Compute(Backend("float32")))
    trunk = Trunk.load(checkpoint, experts, Compute(backend), 64)
    cache = KVCache(trunk.config, 32, 4, torch.float32, torch.device("cpu"))
    steps = [step_batch(chunks, 4, 16) for chunks in ([(0, 9), (0, 4)], [(9, 10), (4, 7)])]
    return [interleave([trunk.forward(batch, cache)])[0] for batch in steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_computes_as_by_torch(name: str, tmp_path: Path) -> None:
    """Also those of which torch computes a part."""
    directory = save_random_family(tmp_path / "model", name)
    wanted = logits_of(directory, Backend("float32"))
    for got, row in zip(logits_of(directory, Backend("float32", trunk="triton")), wanted, strict=True):
        torch.testing.assert_close(got, row, rtol=0, atol=1e-4)
