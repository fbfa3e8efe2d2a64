"""Below the KV cache: tokens are those of an engine without tiers, whatever is evicted, loaded, lost or damaged."""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BEST
from random_mixtral import save_random_mixtral

from moe_ray.config import load_config
from moe_ray.core import Request, SamplingParams, Sequence
from moe_ray.engine.build import build_engine
from moe_ray.engine.engine import Engine
from moe_ray.engine.kv_cache import KVCache
from moe_ray.engine.tiers.disk_file import HEADER
from moe_ray.engine.tiers.host_tier import HostTier
from moe_ray.engine.tiers.load_times import RETRY, LoadTimes
from moe_ray.errors import ConfigError
from moe_ray.experts.local import local_experts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.model_config import ModelConfig

BLOCK = 4
TOKEN_BYTES = 2 * 2 * 2 * 32 * 4
"""Of K and V in two layers, two heads of 32 float32."""
BLOCK_BYTES = BLOCK * TOKEN_BYTES
GIB = 2**30
pytestmark = pytest.mark.skipif(BEST is None, reason="torch's sums depend on the batch: tokens may differ by rounding")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_mixtral(
        tmp_path_factory.mktemp("mixtral"),
        seed=3,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(autouse=True)
def loading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of this model is computed in microseconds: as measured, nothing would ever be loaded."""
    monkeypatch.setattr(LoadTimes, "note_step", lambda *_, **__: None)


def engine_of(model: Path, blocks: int, dtype: str = "float32", **engine: Any) -> Engine:
    """An engine whose KV cache has so many blocks; `swap_blocks`: as many in host memory."""
    if "swap_blocks" in engine:
        engine["kv_swap_gib"] = engine.pop("swap_blocks") * BLOCK_BYTES / GIB
    options = {"kv_cache_gib": 0.1, "kv_cache_tokens": blocks * BLOCK, "block_size": BLOCK, "micro_batches": 1}
    config = load_config(
        {"model": {"dtype": dtype, "device": "cpu", "max_model_len": 64}, "engine": {**options, **engine}}
    )
    checkpoint = Checkpoint.open(model)
    draft = None if config.engine.draft_model is None else Checkpoint.open(model)
    return build_engine(config, checkpoint, lambda compute: local_experts(checkpoint, compute), draft=draft)


def ask(name: str, prompt: list[int], new: int = 12) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))


def run(engine: Engine, requests: list[Request], rng: random.Random | None = None) -> dict[str, list[int]]:
    """Greedy outputs; with `rng`, requests come and go at any time."""
    waiting, outputs = list(requests), {request.request_id: list[int]() for request in requests}
    while waiting or engine.has_work or engine.stats().num_waiting:
        while waiting and (rng is None or rng.random() < 0.4):
            engine.submit(waiting.pop(0))
        if rng is not None and rng.random() < 0.02:
            name = rng.choice(requests).request_id
            if engine.abort(name):
                outputs[name] = []
        engine.wait()
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id] += event.token_ids
        engine.check_integrity()
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    return outputs


def workload(rng: random.Random, count: int) -> list[Request]:
    """Prompts of which many begin alike."""
    shared = [[rng.randrange(3, 256) for _ in range(24)] for _ in range(3)]
    made = []
    for i in range(count):
        head = rng.choice(shared)[: rng.randint(0, 24)]
        tail = [rng.randrange(3, 256) for _ in range(rng.randint(1, 12))]
        made.append(ask(f"r{i}", [*head, *tail], rng.randint(1, 20)))
    return made


@pytest.fixture
def closing() -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    ("seed", "held", "tiers"),
    [
        (0, "auto", {"swap_blocks": 400}),
        (1, "auto", {"swap_blocks": 5}),
        (2, "fp8", {"disk": True}),
        (3, "auto", {"swap_blocks": 60, "speculative": "draft"}),
        (4, "int8", {"swap_blocks": 20, "disk": True, "kv_disk_gib": 12 * (BLOCK_BYTES + HEADER.size) / GIB}),
    ],
)
def test_random_workloads_give_the_tokens_of_an_engine_without(
    model: Path, tmp_path: Path, closing: list[Engine], seed: int, held: str, tiers: dict[str, Any]
) -> None:
    rng = random.Random(seed)
    requests = workload(rng, 24)
    if tiers.pop("disk", False):
        tiers["kv_disk_dir"] = str(tmp_path / "kv")
    if "speculative" in tiers:
        tiers["draft_model"] = str(model)
    engine = engine_of(model, 20, kv_cache_dtype=held, max_num_batched_tokens=24, **tiers)
    closing.append(engine)
    expected = run(engine_of(model, 512, kv_cache_dtype=held), requests)
    got = run(engine, requests, rng)
    assert all(got[name] == expected[name] for name in got if got[name])
    assert sum(bool(tokens) for tokens in got.values()) > 12
    assert run(engine, requests) == expected
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.tier_declined_tokens == 0
    if "kv_swap_gib" in tiers or "swap_blocks" in tiers:
        assert stats.swap_hit_tokens > 0
        assert stats.swap_stored_bytes > 0
        assert stats.swap_loaded_bytes % stats.swap_hit_tokens == 0
    if "kv_disk_dir" in tiers:
        assert stats.disk_written_bytes > 0
        assert stats.disk_hit_tokens > 0 or "kv_disk_gib" in tiers
        assert stats.disk_failures == stats.disk_damaged_files == 0
    if "speculative" in tiers:  # the draft model is the model: it is right wherever its own cache is
        assert stats.draft_tokens > 200
        assert stats.accepted_draft_tokens > 0.8 * stats.draft_tokens
    if "kv_disk_gib" in tiers:
        assert stats.disk_removed_files > 0
        assert stats.disk_bytes <= 12 * (BLOCK_BYTES + HEADER.size)


def test_a_restart_finds_its_prefixes_on_the_disk(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    folder = tmp_path / "made" / "kv"
    requests = workload(random.Random(5), 8)
    first = engine_of(model, 512, kv_disk_dir=str(folder))
    expected = run(first, requests)
    first.close()
    files = sorted(folder.rglob("*.kv"))
    assert len(files) == sum(key is not None for _, key in first._allocator.keyed())
    assert first.stats().disk_bytes == sum(file.stat().st_size for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, *folder.iterdir())} == {0o700}
    again = engine_of(model, 512, kv_disk_dir=str(folder))
    closing.append(again)
    assert run(again, requests) == expected
    stats = again.stats()
    assert stats.disk_hit_tokens > 60
    # All but their last block, which is computed for its logits; those that come together share what is read.
    full = sum((len(each.prompt_token_ids) - 1) // BLOCK * BLOCK for each in requests)
    assert stats.prefix_hit_tokens == full >= stats.disk_hit_tokens
    assert stats.disk_written_bytes < first.stats().disk_written_bytes / 2
    # Of another model, dtype or cache nothing is found.
    for other in (
        engine_of(model, 512, "bfloat16", kv_disk_dir=str(folder)),
        engine_of(model, 512, kv_cache_dtype="fp8", kv_disk_dir=str(folder)),
    ):
        closing.append(other)
        run(other, requests[:1])
        assert other.stats().disk_hit_tokens == 0
    assert len(list(folder.iterdir())) == 3


def test_reads_of_overlapping_prefixes_are_shared(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    """Of a prefix of which a part is in the cache, and then is not: whoever waits, waits for all of it."""
    long, longer = list(range(3, 36)), list(range(3, 60))
    first = engine_of(model, 64, kv_disk_dir=str(tmp_path))
    expected = run(first, [ask("a", long, 2), ask("b", longer, 2)])
    first.close()
    engine = engine_of(model, 64, kv_disk_dir=str(tmp_path))
    closing.append(engine)
    assert run(engine, [ask("head", long[:13], 1)])
    engine.submit(ask("a", long, 2))  # reads what is behind the head
    blocks = engine._allocator.allocate(engine._allocator.num_free)
    assert blocks is not None
    engine._allocator.release(blocks)
    engine.submit(ask("b", longer, 2))  # reads the head, and shares the rest
    engine.submit(ask("c", longer, 2))
    outputs: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    engine.check_integrity()
    assert engine.abort("c")
    while engine.has_work or engine.stats().num_waiting:
        engine.wait()
        for event in engine.step():
            outputs[event.request_id] += event.token_ids
        engine.check_integrity()
    assert (outputs["a"], outputs["b"]) == (expected["a"], expected["b"])
    assert engine._tiers is not None
    assert not engine._tiers._read_of


def test_two_engines_share_a_directory(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    limit = 60 * (BLOCK_BYTES + HEADER.size)
    requests = workload(random.Random(7), 30)
    expected = run(engine_of(model, 512), requests)
    engines = [engine_of(model, 24, kv_disk_dir=str(tmp_path), kv_disk_gib=limit / GIB) for _ in range(2)]
    closing += engines
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for number, request in enumerate(requests):
        engines[number % 2].submit(request)
    while any(engine.has_work or engine.stats().num_waiting for engine in engines):
        for engine in engines:
            engine.wait()
            for event in engine.step():
                outputs[event.request_id] += event.token_ids
            engine.check_integrity()
    assert outputs == expected
    assert all(engine.stats().disk_damaged_files == 0 for engine in engines)
    assert all(engine.stats().disk_failures == 0 for engine in engines)
    for engine in engines:
        engine.close()
    # Each knows what the other wrote as of its last look at the directory.
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.kv")) <= 2 * limit
    assert not list(tmp_path.rglob("*.partial"))


def damage(file: Path, how: int, other: Path) -> None:
    content = bytearray(file.read_bytes())
    if how == 0:
        content[-3] ^= 1
    elif how == 1:
        del content[-1:]
    elif how == 2:
        content = bytearray(other.read_bytes())
    elif how == 3:
        content[HEADER.size - 1] ^= 1
    elif how == 4:
        content.clear()
    else:
        content[9] ^= 1  # of another identity
    file.write_bytes(content)


def test_damaged_files_are_ignored_removed_and_counted(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    requests = [ask(f"r{i}", [10 + i] * 30) for i in range(6)]
    first = engine_of(model, 512, kv_disk_dir=str(tmp_path))
    expected = run(first, requests)
    first.close()
    identity = next(tmp_path.iterdir()).name
    prefixes = engine_of(model, 512)._scheduler.prefixes
    heads = []
    for request in requests:
        seq = Sequence(request, list(request.prompt_token_ids))
        heads.append([tmp_path / identity / f"{key.hex()}.kv" for key in prefixes.keys(seq)])
    for how, files in enumerate(heads):
        damage(files[how % 3], how, files[3])
    again = engine_of(model, 512, kv_disk_dir=str(tmp_path))
    closing.append(again)
    assert run(again, requests) == expected
    stats = again.stats()
    assert stats.disk_damaged_files == 6
    assert stats.disk_hit_tokens == BLOCK * sum(how % 3 for how in range(6)), "up to the damaged one"
    again.close()
    last = engine_of(model, 512, kv_disk_dir=str(tmp_path))
    closing.append(last)
    assert run(last, requests) == expected
    assert last.stats().disk_damaged_files == 0, "they were written anew"
    assert last.stats().disk_hit_tokens == 6 * 7 * BLOCK


def test_a_disk_that_fails_while_running_is_done_without(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    engine = engine_of(model, 20, kv_disk_dir=str(tmp_path / "kv"))
    closing.append(engine)
    requests = workload(random.Random(9), 6)
    shutil.rmtree(tmp_path / "kv")
    assert run(engine, requests) == run(engine_of(model, 512), requests)
    engine.close()
    assert engine.stats().disk_failures >= 1
    assert engine.stats().disk_hit_tokens == 0


def test_a_directory_that_cannot_be_used_is_told_at_the_start(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"engine\.kv_disk_dir .*file/kv: nothing can be written there: .*Not a dir"):
        engine_of(model, 20, kv_disk_dir=str(tmp_path / "file" / "kv"))
    with pytest.raises(ConfigError, match=r"engine\.kv_disk_gib: one block takes \d+ bytes"):
        engine_of(model, 20, kv_disk_dir=str(tmp_path), kv_disk_gib=1e-7)
    for key, value in (("kv_swap_gib", 1), ("kv_disk_dir", "/x")):
        with pytest.raises(ConfigError, match=rf"engine\.{key}.*enable_prefix_caching is false"):
            load_config({"engine": {"enable_prefix_caching": False, key: value}})
    with pytest.raises(ConfigError, match=r"engine\.kv_disk_dir.*must be an absolute path"):
        load_config({"engine": {"kv_disk_dir": "kv"}})


def test_what_is_not_told_below_the_cache_is_computed(model: Path, tmp_path: Path, closing: list[Engine]) -> None:
    """Log-probabilities of a prompt, and its experts, are of positions that are computed."""
    prompt = tuple(range(3, 43))
    for params in (
        SamplingParams(max_tokens=2, prompt_logprobs=1),
        SamplingParams(max_tokens=2, return_routed_experts=True),
    ):
        first = engine_of(model, 64, kv_disk_dir=str(tmp_path))
        run(first, [Request("a", prompt, params)])
        first.close()
        again = engine_of(model, 64, kv_disk_dir=str(tmp_path))
        closing.append(again)
        run(again, [Request("b", prompt, params)])
        assert again.stats().disk_hit_tokens == 0
        assert again.stats().prompt_tokens == len(prompt)


def test_a_preempted_sequence_comes_back_from_host_memory(model: Path) -> None:
    """All of its full blocks: no more than its last partial one is computed again."""
    engine = engine_of(model, 20, swap_blocks=100, max_num_batched_tokens=64)
    requests = [ask(f"r{i}", [20 + i] * 33, 25) for i in range(3)]
    assert run(engine, requests) == run(engine_of(model, 512), requests)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prompt_tokens - 3 * 33 <= stats.preemptions * BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_block_comes_back_to_the_bit(model: Path, dtype: torch.dtype) -> None:
    config = ModelConfig.load(model)
    one, other = (KVCache(config, 5, BLOCK, dtype, torch.device("cpu")) for _ in range(2))
    stores = [(one._store, other._store)]
    if one._scales is not None and other._scales is not None:
        stores.append((one._scales, other._scales))
    for store, _ in stores:
        store.view(torch.uint8).random_(0, 256)
    kept = torch.empty(one.block_nbytes, dtype=torch.uint8)
    assert one.block_nbytes * 5 + one.block_nbytes // BLOCK == one.nbytes
    one.copy_out(3, kept)
    other.copy_in(1, kept)
    for store, target in stores:
        source, target = store.view(torch.uint8), target.view(torch.uint8)
        assert torch.equal(target[:, :, BLOCK : 2 * BLOCK], source[:, :, 3 * BLOCK : 4 * BLOCK])
        assert not target[:, :, :BLOCK].any()
        assert not target[:, :, 2 * BLOCK :].any()


def test_times_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    times = LoadTimes(block_size=16)
    assert times.pays(10, 0), "nothing is known yet"
    times.note_copies(blocks=10, seconds=0.1)
    times.note_step(tokens=16, context=16, seconds=9.0)
    assert times.pays(10, 0), "so small a step says nothing"
    times.note_step(tokens=100, context=128, seconds=0.05)
    times.note_step(tokens=100, context=8000, seconds=1.0)
    assert not times.pays(2, 96), "16 tokens take 8 ms here, a block 10"
    assert times.pays(2, 8000), "and 160 ms there"
    assert times.pays(2, 8000, from_disk=True)
    times.note_reads(blocks=10, seconds=5.0)
    assert not times.pays(2, 8000, from_disk=True)
    assert times.pays(2, 8000)
    asked = [times.pays(2, 96) for _ in range(RETRY + 2)]
    assert asked.count(True) == 1, "now and then it is tried again"
    times.note_copies(blocks=10, seconds=0.0)
    for _ in range(20):
        times.note_copies(blocks=10, seconds=0.01)
    assert times.pays(2, 96)


def test_a_host_that_is_full_gives_up_its_oldest_but_never_what_is_lent() -> None:
    tier = HostTier(2, 8, pinned=False)
    for key in (b"a", b"b"):
        row = tier.place(key)
        assert row is not None
        row.fill_(key[0])
    assert tier.find(b"a") is not None
    tier.lend([b"a"])
    row = tier.place(b"c")
    assert row is not None
    assert b"b" not in tier
    tier.lend([b"a", b"c"])
    assert tier.place(b"d") is None
    tier.check_integrity()
    found = tier.find(b"a")
    assert found is not None
    assert found.tolist() == [97] * 8
    assert HostTier(0, 8, pinned=False).place(b"a") is None
