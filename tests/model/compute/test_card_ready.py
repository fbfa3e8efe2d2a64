"""What a card needs of the torch trunk: steps that never wait for the device, tensors of few shapes. No card here."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import RandomWeights
from card_models import BLOCK, CONFIG, CPU, SINKS
from step_batch import step_batch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moe_ray.core import Batch
from moe_ray.engine.kv_cache import KVCache
from moe_ray.model import moe
from moe_ray.model.compute.torch.plan import MOST_GATHERED, StepPlan, padded_count, plan_step, power_of_two
from moe_ray.model.compute.torch.trunk import TorchTrunk
from moe_ray.model.model_config import ModelConfig


def batch_of(*chunks: tuple[int, int]) -> Batch:
    return step_batch(list(chunks), BLOCK, 40)


def cache() -> KVCache:
    return KVCache(CONFIG, 40 * 6, BLOCK, torch.float32, CPU)


def step(trunk: TorchTrunk, batch: Batch, kv: KVCache, look: bool = True) -> torch.Tensor:
    """One forward pass whose experts are simple functions of the rows; `look`: whether they are told apart."""
    work = trunk.begin(batch, kv)
    for layer in range(CONFIG.num_hidden_layers):
        routed = work.route(layer)
        rows = routed.rows * routed.weights[:, None]
        if look:
            parts = rows.split(routed.counts)
            rows = torch.cat([part * (0.5 + 0.1 * e) for e, part in enumerate(parts)])
        work.combine(routed, rows)
    return work.logits([end - 1 for end in batch.query_start[1:]])


@pytest.mark.parametrize(
    "chunks", [((9, 10), (40, 41), (50, 51)), ((0, 8),), ((8, 20), (0, 5), (16, 17)), ((30, 60),)], ids=str
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("config", [CONFIG, SINKS], ids=["window", "sinks"])
def test_a_step_never_waits_for_the_device(
    config: ModelConfig, chunks: tuple[tuple[int, int], ...], static: bool
) -> None:
    """Fake tensors have shapes but no values: whatever needs one on the host raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        trunk = TorchTrunk(RandomWeights(config, torch.float32), 256, static)  # type: ignore[arg-type]
        logits = step(trunk, batch_of(*chunks), cache(), look=False)
    assert logits.shape == (len(chunks), 100)


def test_what_waits_is_noticed_by_that_test() -> None:
    """Each of what was there, or could come back."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        chosen = torch.zeros(4, 2, dtype=torch.long)
        for wait in (
            lambda: chosen.flatten().bincount(minlength=8),
            lambda: chosen[chosen > 0],
            lambda: chosen.nonzero(),
            lambda: chosen[0, 0].item(),
            lambda: moe.Routed(chosen, chosen, chosen[0], chosen).counts,
        ):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                wait()


def test_counts_are_read_when_they_are_asked_for() -> None:
    counts = torch.tensor([2, 0, 1])
    routed = moe.Routed(torch.zeros(3, 4), torch.ones(3), counts, torch.zeros(3, 1, dtype=torch.long))
    counts[2] = 5  # as if the device were still writing them
    assert routed.counts == [2, 0, 5]
    assert routed.on_host() is routed, "nothing to copy on a CPU"
    assert moe.experts_of(
        moe.Routed(routed.rows, routed.weights, [1, 0, 2], torch.tensor([[0], [2], [1]]))
    ).tolist() == [
        [0],
        [2],
        [2],
    ]


# ---- static shapes


def plan(*contexts: int, static: bool = True) -> StepPlan:
    return plan_step(batch_of(*((n - 1, n) for n in contexts)), cache(), None, CPU, static)


def test_plans_of_similar_batches_have_the_same_shapes() -> None:
    assert plan(20, 20, 20).shapes == plan(17, 31, 32, 19).shapes == ((4,), (4, 32))
    assert plan(3).shapes == plan(16).shapes == ((1,), (1, 16))
    assert plan(10, 100).shapes == ((2,), (2, 128)), "padding at most doubles the work"
    assert plan(5, 9, 100, 110, 120).shapes == ((8,), (4, 128), (1, 16))
    assert plan(5, 9, 11, 100).shapes == ((4,), (2, 128), (2, 16))
    assert plan(20, 20, 20, static=False).shapes == ((3,), (3, 20))


@pytest.mark.parametrize("static", [False, True])
def test_a_gather_is_bounded(static: bool) -> None:
    """Many long contexts are several groups; one that is longer than the bound is a group of its own."""
    made = plan(*[20_000] * 9, static=static)
    assert len(made.decodes) == (2 if not static else 3)
    assert all(group.slots.numel() <= MOST_GATHERED for group in made.decodes)
    assert {row for group in made.decodes for row in group.rows.tolist()} == set(range(9))
    assert [group.slots.shape[0] for group in plan(20, MOST_GATHERED + 1, static=static).decodes] == [1, 1]


def test_there_are_few_shapes() -> None:
    """However long the contexts of up to 4 sequences of up to 128 tokens are."""
    lengths = (1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 128)
    shapes = {plan(*each).shapes for n in (1, 2, 3, 4) for each in itertools.combinations(lengths, n)}
    assert len(shapes) < 40
    for tokens, *groups in shapes:
        assert tokens[0] == padded_count(tokens[0])
        assert all(b == padded_count(b) and s == power_of_two(s) for b, s in groups)


def test_there_are_few_numbers_of_tokens() -> None:
    numbers = [padded_count(n) for n in range(1, 513)]
    assert sorted(set(numbers)) == [1, 2, 4, *range(8, 65, 8), *range(80, 513, 16)]
    assert numbers == sorted(numbers)
    assert all(n <= padded < 2 * n for n, padded in enumerate(numbers, 1))
    assert max(padded / n for n, padded in enumerate(numbers, 1) if n > 64) < 1.25


def test_what_a_step_brings_to_a_card_is_aligned() -> None:
    """Triton compiles a kernel once more for what is not."""
    for contexts in ((3,), (20, 20, 20), (5, 9, 11, 100)):
        for static in (False, True):
            tensors = [each for each in plan(*contexts, static=static).tensors() if each.dtype == torch.int64]
            assert len(tensors) >= 6
            assert all(each.data_ptr() % 16 == 0 for each in tensors)


def test_padding_is_written_to_a_slot_that_no_block_has() -> None:
    made, kv = plan(20, 20, 20), cache()
    assert made.slot_mapping.tolist()[3:] == [kv.spare_slot]
    assert kv.spare_slot == 40 * 6 * BLOCK
    assert kv.layer(0).k.shape[0] == kv.spare_slot + 1


def test_a_batch_with_a_prefill_is_not_padded() -> None:
    mixed = plan_step(batch_of((0, 5), (19, 20)), cache(), None, CPU, True)
    assert not mixed.padded
    assert mixed.positions.shape == (6,)


@torch.inference_mode()
def test_padding_changes_no_result() -> None:
    """Prefill five sequences, then decode some of them, with and without padding."""
    plain, static = (TorchTrunk(RandomWeights(CONFIG, torch.float32), 256, static) for static in (False, True))  # type: ignore[arg-type]
    caches = cache(), cache()
    lengths = (5, 18, 33, 61, 100)
    for trunk, kv in zip((plain, static), caches, strict=True):
        step(trunk, batch_of(*((0, n) for n in lengths)), kv)
    for turn in range(3):
        decodes = batch_of(*((n + turn, n + turn + 1) for n in lengths))
        wanted, got = (step(trunk, decodes, kv) for trunk, kv in zip((plain, static), caches, strict=True))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for layer in range(CONFIG.num_hidden_layers):
        mine, other = caches[1].layer(layer), caches[0].layer(layer)
        for ours, theirs in ((mine.k, other.k), (mine.v, other.v)):
            torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-5, atol=1e-5)
            assert bool((theirs[-1] == 0).all()), "nothing is written to the spare slot without padding"
            assert bool(ours.isfinite().all())
