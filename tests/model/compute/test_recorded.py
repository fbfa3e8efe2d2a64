"""Steps of decoding that are recorded and replayed: no bit differs from steps that are launched as they come.

There are no CUDA graphs here: `CallRecorder` keeps their contract. Outputs are undefined until a replay, stay where
they are, and are computed from what is in the memory of the first step's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from backends import RandomWeights
from card_models import BLOCK, CONFIG, CPU, SINKS
from random_families import save_random_family
from step_batch import step_batch

from moe_ray.core import Batch
from moe_ray.engine.kv_cache import KVCache
from moe_ray.model import moe
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.compute.base import Pass
from moe_ray.model.compute.compute import has_cuda
from moe_ray.model.compute.torch.recorded import AFTER, Recordings
from moe_ray.model.compute.torch.recorded_step import RecordedPass
from moe_ray.model.compute.torch.recorders import (
    CallRecorder,
    CudaRecorder,
    Recorder,
    Recording,
    RecordingPool,
    Tensors,
    unowned,
)
from moe_ray.model.compute.torch.trunk import TorchPass, TorchTrunk
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import TrunkWeights


class CountingRecorder:
    """Counts what it records."""

    def __init__(self, on: Recorder | None = None) -> None:
        self.count, self._on = 0, on or CallRecorder()

    def pool(self) -> RecordingPool:
        return self._on.pool()

    def record(self, run: Callable[[], Tensors], pool: RecordingPool | None = None) -> Recording:
        self.count += 1
        return self._on.record(run, pool)


def decodes(*contexts: int) -> Batch:
    return step_batch([(n - 1, n) for n in contexts], BLOCK, 40)


def by_experts(routed: moe.Routed) -> torch.Tensor:
    """Experts that are simple functions of the rows, each another one."""
    parts = (routed.rows * routed.weights[:, None]).split(routed.counts)
    return torch.cat([part * (0.5 + 0.1 * e) for e, part in enumerate(parts)]).to(routed.rows.dtype)


def going(work: Pass, layers: int, rows: list[int]) -> Iterator[torch.Tensor | None]:
    """A forward pass that stops where a micro-batch waits; logits at last."""
    for layer in range(layers):
        routed = work.route(layer)
        work.add_shared(layer)
        if routed is not None:
            yield None
            work.combine(routed, by_experts(routed))
    yield work.logits(rows)


def logits_of(work: Pass, batch: Batch, layers: int = 3) -> torch.Tensor:
    *_, logits = going(work, layers, [end - 1 for end in batch.query_start[1:]])
    assert logits is not None
    return logits


class Pair:
    """The same trunk twice: launched as it comes, and recorded."""

    def __init__(
        self,
        config: ModelConfig = CONFIG,
        dtype: torch.dtype = torch.float32,
        weights: TrunkWeights | None = None,
        on: Recorder | None = None,
    ) -> None:
        """`on`: records on a card, where the weights are."""
        self.recorder, self.layers = CountingRecorder(on), config.num_hidden_layers
        read: TrunkWeights = weights or RandomWeights(config, dtype)  # type: ignore[assignment]
        self.plain = TorchTrunk(read, 256, True)
        self.recorded = TorchTrunk(read, 256, True, recorder=self.recorder)
        self.caches = [KVCache(config, 40 * 6, BLOCK, dtype, read.device) for _ in range(2)]

    def step(self, batch: Batch) -> Pass:
        """Compute a batch by both, compare, and return the pass of the recorded one."""
        wanted = logits_of(self.plain.begin(batch, self.caches[0]), batch, self.layers)
        work = self.recorded.begin(batch, self.caches[1])
        assert torch.equal(logits_of(work, batch, self.layers), wanted)
        for layer in range(self.layers):
            mine, theirs = (cache.layer(layer) for cache in self.caches)
            assert torch.equal(mine.k, theirs.k)
            assert torch.equal(mine.v, theirs.v)
        return work


@torch.inference_mode()
@pytest.mark.parametrize("config", [CONFIG, SINKS], ids=["window", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_have_every_bit(config: ModelConfig, dtype: torch.dtype) -> None:
    """While contexts grow over powers of two and sequences come and go."""
    pair, lengths = Pair(config, dtype), [5, 18, 33]
    pair.step(step_batch([(0, n) for n in lengths], BLOCK, 40))
    passes = [pair.step(decodes(*(n + turn for n in lengths))) for turn in range(1, 12)]
    recorded = [isinstance(work, RecordedPass) for work in passes]
    assert recorded[:AFTER] == [False] * AFTER
    assert sum(recorded) >= 5
    assert isinstance(pair.step(decodes(17, 30)), TorchPass), "two sequences are padded to two, and not to four"
    assert isinstance(pair.step(step_batch([(17, 18), (30, 33)], BLOCK, 40)), TorchPass), "a chunk is launched"
    assert isinstance(pair.step(decodes(16, 30, 45)), RecordedPass)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("case", "parts"),
    [("qwen2_moe", 5), ("qwen2_moe, layers without experts", 5), ("deepseek_v2", 5), ("olmoe", 3)],
)
def test_families_with_shared_experts_dense_layers_and_latents(tmp_path: Path, case: str, parts: int) -> None:
    checkpoint = Checkpoint.open(save_random_family(tmp_path / "model", case))
    pair = Pair(checkpoint.config, weights=TrunkWeights(checkpoint, torch.float32, CPU))
    passes = [pair.step(decodes(20 + turn, 25)) for turn in range(6)]
    assert isinstance(passes[-1], RecordedPass)
    assert pair.recorder.count == parts


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
@torch.inference_mode()
@pytest.mark.parametrize("case", ["qwen2_moe", "qwen2_moe, layers without experts", "deepseek_v2", "olmoe"])
def test_cuda_graphs_have_every_bit(tmp_path: Path, case: str) -> None:
    checkpoint = Checkpoint.open(save_random_family(tmp_path / "model", case))
    weights = TrunkWeights(checkpoint, torch.bfloat16, torch.device("cuda"))
    pair = Pair(checkpoint.config, torch.bfloat16, weights, CudaRecorder())
    passes = [pair.step(decodes(20 + turn, 25)) for turn in range(8)]
    assert all(isinstance(work, RecordedPass) for work in passes[AFTER:])
    assert pair.recorder.count > 0


@torch.inference_mode()
def test_each_part_is_recorded_once() -> None:
    pair = Pair()
    for turn in range(8):
        pair.step(decodes(20 + turn, 25))
    assert pair.recorder.count == CONFIG.num_hidden_layers + 1


@torch.inference_mode()
def test_micro_batches_of_one_key_do_not_meet() -> None:
    pair = Pair()
    for turn in range(AFTER + 1):
        pair.step(decodes(20 + turn, 25))
    batches = [decodes(24, 26), decodes(27, 28)]
    wanted = [logits_of(pair.plain.begin(batch, pair.caches[0]), batch) for batch in batches]
    works = [pair.recorded.begin(batch, pair.caches[1]) for batch in batches]
    assert all(isinstance(work, RecordedPass) for work in works)
    ways = [going(work, 3, [0, 1]) for work in works]
    results = [list(step) for step in zip(*ways, strict=True)]
    for got, expected in zip(results[-1], wanted, strict=True):
        assert got is not None
        assert torch.equal(got, expected)
    assert pair.recorder.count == 2 * (CONFIG.num_hidden_layers + 1)


@torch.inference_mode()
def test_a_pass_that_is_given_up_leaves_its_recording_to_the_next() -> None:
    pair = Pair()
    for turn in range(AFTER + 1):
        pair.step(decodes(20 + turn, 25))
    work = pair.recorded.begin(decodes(23, 26), pair.caches[1])
    routed = work.route(0)
    assert routed is not None
    del work, routed
    count = pair.recorder.count
    assert isinstance(pair.step(decodes(23, 26)), RecordedPass)
    assert pair.recorder.count == count


@torch.inference_mode()
def test_logits_outlive_the_next_step() -> None:
    pair = Pair()
    for turn in range(AFTER + 1):
        pair.step(decodes(20 + turn, 25))
    first = decodes(23, 26)
    logits = logits_of(pair.recorded.begin(first, pair.caches[1]), first)
    before = logits.clone()
    second = decodes(24, 27)
    logits_of(pair.recorded.begin(second, pair.caches[1]), second)
    assert torch.equal(logits, before)


@torch.inference_mode()
def test_some_rows_of_a_step_have_logits() -> None:
    pair = Pair()
    for turn in range(AFTER + 2):
        batch = decodes(20 + turn, 25, 30)
        plain, recorded = (
            trunk.begin(batch, kv) for trunk, kv in zip((pair.plain, pair.recorded), pair.caches, strict=True)
        )
        wanted, got = (list(going(work, 3, [0, 2]))[-1] for work in (plain, recorded))
        assert wanted is not None
        assert got is not None
        assert torch.equal(got, wanted)


class RefusingRecorder(CallRecorder):
    """Refuses from the third part on, after it has run it, as a capture does."""

    count = 0

    def record(self, run: Callable[[], Tensors], pool: RecordingPool | None = None) -> Recording:
        self.count += 1
        recording = super().record(run, pool)
        if self.count > 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more of it")
        return recording


@torch.inference_mode()
def test_what_cannot_be_recorded_is_launched_and_said(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    pair.recorded = TorchTrunk(RandomWeights(CONFIG, torch.float32), 256, True, recorder=RefusingRecorder())  # type: ignore[arg-type]
    passes = [pair.step(decodes(20 + turn, 25)) for turn in range(AFTER + 4)]
    assert [isinstance(work, RecordedPass) for work in passes] == [False] * AFTER + [True] + [False] * 3
    (said,) = caplog.messages
    assert said.endswith("(operation not permitted when stream is capturing)")


class OneTrunk:
    """Steps of one sequence, and the contexts whose passes were made to be recorded."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self._trunk = TorchTrunk(RandomWeights(CONFIG, torch.float32), 256, True)  # type: ignore[arg-type]
        self._cache = KVCache(CONFIG, 40 * 6, BLOCK, torch.float32, CPU)

    def step(self, held: Recordings, context: int) -> None:
        batch = decodes(context)

        def make() -> TorchPass:
            self.made.append(context)
            launched = self._trunk.begin(batch, self._cache)
            assert isinstance(launched, TorchPass)
            return launched

        work = held.begin(make, self._trunk.ops.plan(batch, self._cache, True), self._cache)
        assert work is not None
        logits_of(work, batch)


@torch.inference_mode()
def test_few_recordings_are_kept() -> None:
    one = OneTrunk()
    held = Recordings(CallRecorder(), after=0, most_kept=3)
    for context in (9, 20, 40, 9, 100, 9, 20):
        one.step(held, context)
    assert one.made == [9, 20, 40, 100, 20], "room is made when a fourth comes: 20 was used longest ago"


@torch.inference_mode()
def test_recordings_of_all_sizes_have_one_memory(caplog: pytest.LogCaptureFixture) -> None:
    """What a fourth needs is there already; and where it is too much, they begin anew."""
    caplog.set_level("INFO")
    one, held = OneTrunk(), Recordings(CallRecorder(), after=0)
    one.step(held, 100)
    first = held.nbytes
    for context in (9, 20, 40):
        one.step(held, context)
    assert held.nbytes == first
    assert first < 40 * 4 * (64 + 100) * 4, "and not that of four parts"
    small = Recordings(CallRecorder(), most_bytes=first - 1, after=0)
    one.made.clear()
    for context in (9, 9, 20, 9):
        one.step(small, context)
    assert one.made == [9, 20, 9]
    assert small.nbytes == first
    assert caplog.text.count("they are recorded anew") == 2


@torch.inference_mode()
@pytest.mark.parametrize(("lengths", "most"), [(range(33, 57), 6), (range(4, 52, 2), 14)], ids=["alike", "unlike"])
def test_sequences_that_come_and_go_are_served_by_few_recordings(lengths: range, most: int) -> None:
    """One comes or goes at each step, between 1 and 24: every bit is that of steps that are launched as they come."""
    pair = Pair()
    pair.caches = [KVCache(CONFIG, 40 * 25, BLOCK, torch.float32, CPU) for _ in range(2)]
    pair.step(step_batch([(0, n) for n in lengths], BLOCK, 40))
    counts = [*range(1, 25), *range(23, 0, -1), *range(2, 25)]
    passes = [
        pair.step(step_batch([(n + turn // 10, n + turn // 10 + 1) for n in lengths[:count]], BLOCK, 40))
        for turn, count in enumerate(counts)
    ]
    recordings = pair.recorded._recordings
    assert recordings is not None
    (lane,) = recordings.lanes
    assert len(lane.kept) <= most
    assert pair.recorder.count == len(lane.kept) * (CONFIG.num_hidden_layers + 1)
    recorded = sum(isinstance(work, RecordedPass) for work in passes)
    assert recorded == len(passes) - AFTER * most if most == 6 else recorded > len(passes) // 3


@torch.inference_mode()
def test_padding_is_nowhere_seen() -> None:
    """Rows of the tokens alone are sent, and what stands behind them has no effect on any."""
    pair = Pair()
    for turn in range(AFTER + 1):
        pair.step(decodes(20 + turn, 25, 30))
    for contexts in ((23, 26, 31), (24, 27, 32)):
        batch = decodes(*contexts)
        work = pair.recorded.begin(batch, pair.caches[1])
        assert isinstance(work, RecordedPass)
        plain = pair.plain.begin(batch, pair.caches[0])
        for layer in range(3):
            routed, wanted = work.route(layer), plain.route(layer)
            assert routed is not None
            assert wanted is not None
            for mine, theirs in zip(routed.tensors(), wanted.tensors(), strict=True):
                assert torch.equal(mine, theirs)
            assert len(routed.rows) == sum(routed.counts) == 3 * CONFIG.num_experts_per_tok
            rows = by_experts(routed)
            answers = work._recording.answers
            if answers is not None:
                answers.fill_(torch.nan)  # of another step, whose experts went mad
            work.combine(routed, rows)
            plain.combine(wanted, rows)
        assert torch.equal(work.logits([0, 1, 2]), plain.logits([0, 1, 2]))
        padding = work._recording.held.state[0][3:]
        assert padding.isfinite().all()


@torch.inference_mode()
def test_a_recording_that_a_pass_gave_up_is_made_anew() -> None:
    """The parts behind would be recorded over the memory of those that are there."""
    pair = Pair()
    for turn in range(AFTER):
        pair.step(decodes(20 + turn, 25))
    work = pair.recorded.begin(decodes(23, 26), pair.caches[1])
    for layer in (0, 1):
        routed = work.route(layer)
        assert routed is not None
        work.combine(routed, by_experts(routed))
    del work, routed
    for turn in range(3):
        assert isinstance(pair.step(decodes(23 + turn, 26)), RecordedPass)
    assert pair.recorder.count == 2 + CONFIG.num_hidden_layers + 1


def test_a_pool_gives_memory_to_others_that_its_owner_released() -> None:
    recorder = CallRecorder()
    pool, source = recorder.pool(), torch.arange(3.0)
    first = recorder.record(lambda: (source + 1,), pool)
    kept = first.outputs[0]
    second = recorder.record(lambda: (source + 2,), pool)
    assert pool.nbytes == 24, "the first has its memory still"
    second.replay()
    first.replay()
    del kept
    first.release()
    assert first.outputs[0].tolist() == [1, 2, 3]
    third = recorder.record(lambda: (source + 3,), pool)
    assert pool.nbytes == 24
    third.replay()
    assert first.outputs[0].tolist() == [3, 4, 5], "which is another's by now"
    first.replay()
    assert first.outputs[0].tolist() == [1, 2, 3]
    assert third.outputs[0].tolist() == [1, 2, 3], "who replays it later finds it changed"


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_what_is_not_owned_is_the_same_memory(shape: tuple[int, ...]) -> None:
    owner = torch.zeros(shape, dtype=torch.bfloat16)
    other = unowned(owner)
    owner.fill_(3)
    assert other.shape == owner.shape
    assert torch.equal(other, owner)
    if len(shape) == 2:
        part = torch.arange(24.0).view(4, 6)[1:, ::2].T
        assert torch.equal(unowned(part), part)


def test_what_a_call_recorder_gives_is_undefined_before_a_replay() -> None:
    source = torch.arange(3.0)

    def run() -> Tensors:
        return (source * 2, source.long())

    recording = CallRecorder().record(run)
    floats, numbers = recording.outputs
    assert floats.isnan().all()
    assert (numbers == -1).all()
    source += 1
    recording.replay()
    assert floats.tolist() == [2, 4, 6]
    assert numbers.tolist() == [1, 2, 3]
    assert recording.outputs[0] is floats
