"""Experts by Triton where they are used: read from checkpoints, with adapters, behind a worker, under an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted import SHAPE, AdaptedModel, save_old_adapter
from backends import open_backend
from random_mixtral import save_random_mixtral
from reference import Reference
from stepping import events_of

from moe_ray.core import AdapterRows, ExpertCall, Request, SamplingParams
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.errors import AdapterNotHeld
from moe_ray.experts.local import local_experts
from moe_ray.experts.server.worker import ExpertWorker
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.resolve import Backend
from moe_ray.model.compute.triton.launch import INTERPRETED
from moe_ray.model.expert_reader import ExpertReader, read_experts
from moe_ray.model.formats.held import HeldAs, grouping
from moe_ray.model.formats.rounding import round_to_nearest
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.model.matrix import tensor_of
from moe_ray.model.trunk import Trunk

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card is here: these compute on a CPU")
KEY = (1, 2)
HIDDEN, INNER = SHAPE["hidden_size"], SHAPE["intermediate_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(tmp_path_factory.mktemp("model"), seed=1, initializer_range=0.15, **SHAPE)


def by_triton(dtype: str = "float32") -> Compute:
    return open_backend(f"triton {dtype}")


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=generator), torch.rand(count, generator=generator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_of_a_checkpoint(model: Path, dtype: str) -> None:
    x, weights = rows(5)
    expected = read_experts(Checkpoint.open(model), {KEY}, Compute(Backend("float32"))).forward(KEY, x, weights)
    reader = ExpertReader(Checkpoint.open(model), {KEY}, by_triton(dtype))
    assert reader.held(KEY) == dtype
    got = reader.read(KEY).forward(x.to(getattr(torch, dtype)), weights)
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype] * float(expected.abs().max())
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_quantised_on_load(model: Path, quantize: str) -> None:
    """As the codes say that `formats.rounding` makes of the weights."""
    checkpoint = Checkpoint.open(model)
    reader = ExpertReader(checkpoint, {KEY}, by_triton(), quantize=quantize)
    ffn = reader.read(KEY)
    values = []
    for matrix in reader._matrices[KEY]:
        how = grouping(quantize, matrix.shape[1])
        assert how is not None
        rounded = round_to_nearest(tensor_of(matrix.values()), how, search=how.levels is None)
        values.append(torch.from_numpy(rounded.values()).double())
    x, weights = rows(3)
    w1, w3, w2 = values
    wide = x.double()
    expected = (torch.nn.functional.silu(wide @ w1.T) * (wide @ w3.T)) @ w2.T * weights.double()[:, None]
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(ffn.forward(x, weights).double(), expected, rtol=0, atol=tolerance)
    planned = 2 * HeldAs("float32", quantize).nbytes("gate", (INNER, HIDDEN))
    planned += HeldAs("float32", quantize).nbytes("down", (HIDDEN, INNER))
    assert planned <= ffn.nbytes <= 2.2 * planned, "of so small matrices, what fills tiles is much"


def test_tiles_of_a_large_model_are_filled() -> None:
    """What is planned for a weight is what it takes, for sizes of models that are served."""
    from moe_ray.model.compute.triton.tiles import TiledWeight, Tiling

    for n, k in ((14336, 4096), (4096, 14336), (768, 2048), (2880, 2880)):
        for form in ("int8", "int4", "nf4", "bfloat16"):
            weight = TiledWeight.blank(Tiling(n, k, 1, torch.bfloat16, grouping(form, k)), "meta")
            quantization = None if form == "bfloat16" else form
            planned = HeldAs("bfloat16", quantization).nbytes("gate", (n, k))
            assert planned <= weight.nbytes <= 1.03 * planned, (n, k, form)


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_a_replica_takes_the_weights_of_another(model: Path, quantize: str | None) -> None:
    readers = [ExpertReader(Checkpoint.open(model), {KEY}, by_triton(), quantize=quantize) for _ in range(2)]
    assert readers[0].layout == readers[1].layout
    assert readers[0].layout != ExpertReader(Checkpoint.open(model), {KEY}, Compute(Backend("float32"))).layout
    source, blank = readers[0].read(KEY), readers[1].blank(KEY)
    assert [len(each) for each in source.buffers()] == [len(each) for each in blank.buffers]
    for taken, given in zip(blank.buffers, source.buffers(), strict=True):
        taken[:] = given
    copy = blank.make()
    x, weights = rows(4)
    assert torch.equal(copy.forward(x, weights), source.forward(x, weights))
    assert copy.nbytes == source.nbytes


def test_a_worker_computes_calls(model: Path) -> None:
    ffns = read_experts(Checkpoint.open(model), {KEY}, by_triton())
    worker = ExpertWorker(ffns, HIDDEN, by_triton())
    x, weights = rows(6)
    reply = worker.forward(ExpertCall(*KEY, x, weights, 1))
    assert torch.equal(reply.rows, ffns.forward(KEY, x, weights))


def test_adapters_are_added(model: Path, tmp_path: Path) -> None:
    """To the rows that are theirs: as torch adds them, and the same bits alone and in company."""
    adapters = [
        read_adapter(save_old_adapter(tmp_path / "one", 5), Checkpoint.open(model).config),
        read_adapter(save_old_adapter(tmp_path / "two", 6, ("w2",), 20), Checkpoint.open(model).config),
    ]
    one, two = (each.adapter_id for each in adapters)
    ffns = [
        read_experts(Checkpoint.open(model), {KEY}, each)[KEY] for each in (by_triton(), Compute(Backend("float32")))
    ]
    for ffn in ffns:
        for adapter in adapters:
            ffn.add_adapter(adapter.adapter_id, adapter.expert_part(*KEY))
    x, weights = rows(24)
    runs = (AdapterRows(0, 2), AdapterRows(one, 18), AdapterRows(two, 3), AdapterRows(0, 1))
    got, expected = (ffn.forward(x, weights, runs) for ffn in ffns)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    triton = ffns[0]
    plain = triton.forward(x, weights)
    assert torch.equal(got[:2], plain[:2])
    assert torch.equal(got[23:], plain[23:])
    assert not torch.isclose(got[2:23], plain[2:23]).all(1).any()
    for at, adapter_id in ((2, one), (19, one), (20, two), (22, two)):
        alone = triton.forward(x[at : at + 1], weights[at : at + 1], (AdapterRows(adapter_id, 1),))
        assert torch.equal(alone, got[at : at + 1])
    assert triton.adapter_bytes > 0
    assert triton.has_adapter(one)
    triton.remove_adapter(one)
    with pytest.raises(AdapterNotHeld, match=f"adapter {one} is not held"):
        triton.forward(x, weights, runs)
    with pytest.raises(AdapterNotHeld, match=f"adapter {one} is not held"):
        triton.adapter_handle(one)


def test_runs_of_adapters_are_cut_with_the_rows(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(save_old_adapter(tmp_path / "one", 5), Checkpoint.open(model).config)
    ffn = read_experts(Checkpoint.open(model), {KEY}, by_triton())[KEY]
    ffn.add_adapter(adapter.adapter_id, adapter.expert_part(*KEY))
    x, weights = rows(20)
    runs = (
        AdapterRows(0, 3),
        AdapterRows(adapter.adapter_id, 12),
        AdapterRows(0, 1),
        AdapterRows(adapter.adapter_id, 4),
    )
    whole = ffn.forward(x, weights, runs)
    monkeypatch.setattr("moe_ray.model.compute.triton.products.MOST_ROWS", 8)
    assert torch.equal(ffn.forward(x, weights, runs), whole)


def test_sequences_with_adapters_by_triton_and_by_torch(model: Path, tmp_path: Path) -> None:
    path = save_old_adapter(tmp_path / "old", 5)
    prompts = [[1, 5, 9, 2], [7, 3, 3]]
    texts = []
    for compute in (by_triton(), Compute(Backend("float32"))):
        adapted = AdaptedModel(model, compute)
        number = adapted.add(path).adapter_id
        texts.append(adapted.generate([(0, prompts[0]), (number, prompts[1])], 4))
    assert texts[0] == texts[1]


def test_an_engine_gives_the_tokens_of_transformers(model: Path) -> None:
    """Greedy, in float32, a prompt beside decodes; the trunk is torch's."""
    checkpoint, compute = Checkpoint.open(model), by_triton()
    trunk = Trunk.load(checkpoint, local_experts(checkpoint, compute), compute, 64)
    engine = Engine(trunk, EngineOptions(32, 8, max_model_len=64))
    reference = Reference(model)
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    prompts = {"a": (1, 5, 9, 2, 11), "b": tuple(range(3, 25))}
    events = events_of(engine, [Request(name, prompt, sampling) for name, prompt in prompts.items()], (0, 2))
    for name, prompt in prompts.items():
        tokens = [token for event in events[name] for token in event.token_ids]
        assert tokens == reference.greedy(prompt, 6)
