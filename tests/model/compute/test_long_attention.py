"""Attention over long contexts: the same bits in tiles, in partitions and over positions that sequences share."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from backends import BEST, HERE, open_backend
from chunks import Chunks, model

from moe_ray.model.compute.compute import Compute
from moe_ray.model.compute.native.cascade import PARTITION, shared_positions
from moe_ray.model.model_config import ModelConfig

LENGTH = 1280
"""Room for a sequence of two whole partitions of 512 positions, and a part of a third."""
PROMPT = [3 + (5 * i + i // 7) % 91 for i in range(1107)]
CONFIGS = {
    "1 head": model(2, 2, 32, num_hidden_layers=1),
    "2 heads": model(4, 2, 64, num_hidden_layers=1),
    "3 heads": model(3, 1, 32, num_hidden_layers=1),
    "4 heads": model(4, 1, 96),
    "7 heads, window": model(7, 1, 32, num_hidden_layers=1, sliding_window=517),
    "16 heads": model(16, 1, 64, num_hidden_layers=1),
    "window": model(4, 2, 64, num_hidden_layers=1, sliding_window=301),
    "window of 1 head": model(2, 2, 32, num_hidden_layers=1, sliding_window=37),
    "sinks": model(8, 1, 32, model_type="gpt_oss", sliding_window=37, num_local_experts=4),
}
"""By query heads of a KV head; with sinks, the first layer has a window, the second one has none."""
NAMES = [
    *(f"native {dtype}" for dtype in ("float32", "bfloat16", "float16")),
    *(f"{name} bfloat16" for name in HERE if name != BEST),
]
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
held = pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])


@pytest.fixture(scope="module", params=NAMES)
def compute(request: pytest.FixtureRequest) -> Compute:
    return open_backend(request.param)


@configs
@held
def test_tiles_are_single_tokens(config: ModelConfig, compute: Compute, cache: str) -> None:
    """Chunks that are computed in tiles, of any length and beginning, and tokens that are computed alone."""
    whole = Chunks(compute, config, kv_cache_dtype=cache, length=LENGTH)
    expected, _ = whole.run([(0, PROMPT, 0, len(PROMPT))])
    assert bool(expected.isfinite().all())
    parts = Chunks(compute, config, kv_cache_dtype=cache, trunk=whole.trunk, length=LENGTH)
    bounds = [0, 1, 2, 33, 500, 503, 504, 510, 511, 512, 513, 514, 515, 530, 1000, 1019, 1023, 1024, 1025, 1030, 1107]
    for start, end in itertools.pairwise(bounds):
        got, _ = parts.run([(0, PROMPT, start, end)])
        assert torch.equal(got, expected[start:end]), f"positions {start} to {end}"


class Shared(Chunks):
    """Sequences that have the first blocks of another one: number → that one, and how many blocks."""

    of: ClassVar[dict[int, tuple[int, int]]] = {}

    def table(self, number: int, blocks: int) -> list[int]:
        other, count = self.of.get(number, (number, 0))
        return (super().table(other, min(count, blocks)) + super().table(number, blocks)[count:])[:blocks]


@configs
@held
def test_what_sequences_share_changes_nothing(config: ModelConfig, compute: Compute, cache: str) -> None:
    """Sequences of unlike lengths behind one prefix, of one and of two partitions, beside one that shares nothing."""
    whole = Chunks(compute, config, kv_cache_dtype=cache, length=LENGTH)
    prompts = {
        0: PROMPT,
        1: PROMPT[:1060] + PROMPT[:20],
        2: PROMPT[:520] + PROMPT[:30],
        3: PROMPT[:1024] + PROMPT[7:9],
        4: PROMPT[::-1],
        5: PROMPT[:600] + PROMPT[1:4],
    }
    expected = {i: whole.run([(i, prompt, 0, len(prompt))])[0] for i, prompt in prompts.items()}
    shared = Shared(compute, config, kv_cache_dtype=cache, trunk=whole.trunk, length=LENGTH)
    blocks = {1: 265, 2: 130, 3: 256, 5: 150}
    Shared.of = {number: (0, count) for number, count in blocks.items()}
    shared.run([(0, PROMPT, 0, 1090)])
    for number in (1, 2, 3, 5):
        shared.run([(number, prompts[number], blocks[number] * 4, len(prompts[number]) - 1)])
    shared.run([(4, prompts[4], 0, len(prompts[4]) - 1)])
    last = [(4, 1), (1, 1), (2, 1), (0, 17), (5, 1), (3, 1)]
    got, _ = shared.run([(i, prompts[i], len(prompts[i]) - count, len(prompts[i])) for i, count in last])
    assert torch.equal(got, torch.cat([expected[i][-count:] for i, count in last]))


ONE, OTHER = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("tables", "contexts", "expected"),
    [
        ([ONE, [20, 21, 22, 23, 24]], [1024, 600], None),
        ([ONE, ONE[:4]], [1024, 511], None),  # a partition that is not computed yet
        ([ONE, ONE[:6]], [1024, 700], [(0, 512), (0, 512)]),
        ([ONE, OTHER, ONE], [1100, 1100, 1100], [(0, 1024), (1, 0), (0, 1024)]),
        (
            [ONE, OTHER, OTHER, ONE, OTHER, [30, 31, 32, 33]],
            [1024, 1100, 1100, 1024, 1100, 512],
            [(0, 1024), (1, 1024), (1, 1024), (0, 1024), (1, 1024), (5, 0)],
        ),
        ([[*ONE[:5], n] for n in range(20, 28)], [700] * 8, [(0, 512)] * 8),
        ([ONE, ONE, *([*ONE[:4], n] for n in range(20, 28))], [1024, 1024, *[600] * 8], [(0, 512)] * 10),
    ],
)
def test_who_shares_what(tables: list[list[int]], contexts: list[int], expected: list[tuple[int, int]] | None) -> None:
    """By partitions of 512 positions, 4 blocks of 128; with whom most is saved."""
    found = shared_positions(tables, contexts, PARTITION // 4)
    assert (None if found is None else list(zip(*map(list, found), strict=True))) == expected
