"""The arithmetic of the bounds, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from moe_ray.bench.m1 import M1, config_json
from moe_ray.bench.probe import MachineSpeed, middle
from moe_ray.bench.report import Report
from moe_ray.bench.roofline import (
    Rates,
    RooflineOptions,
    Work,
    bound,
    curves,
    distinct_experts,
    matmul_shapes,
    roofline_row,
    work_of,
)
from moe_ray.model.model_config import ModelConfig

SMALL = Work(
    shared_bytes=2_000_000_000,
    expert_bytes=500_000_000,
    kv_bytes_per_token=1_000_000,
    num_layers=2,
    num_experts=8,
    top_k=2,
    flop_per_token=3_000_000_000,
    head_flop=1_000_000_000,
)
MACHINE = MachineSpeed(read_gb_per_s=10, gflop_per_s=100)


def test_distinct_experts() -> None:
    assert distinct_experts(8, 2, 1) == pytest.approx(2)
    assert distinct_experts(8, 2, 2) == pytest.approx(3.5)  # 8 * (1 - 0.75²)
    assert distinct_experts(8, 2, 1000) == pytest.approx(8)


def test_work_of_m1() -> None:
    work = work_of(ModelConfig.from_dict(config_json(M1)), "bfloat16")
    attention = 1024 * 64 * (16 + 4 + 4 + 16)
    layer = attention + 1024 * 8
    norms, head = 17 * 1024, 32_000 * 1024
    assert work.shared_bytes == 2 * (8 * layer + norms + head)
    assert work.expert_bytes == 2 * 3 * 1024 * 3584
    assert work.kv_bytes_per_token == 2 * 8 * 2 * 4 * 64
    assert work.flop_per_token == 2 * 8 * (layer + 2 * 3 * 1024 * 3584)
    assert work.head_flop == 2 * head


def test_a_tied_embedding_is_read_as_the_head() -> None:
    raw = config_json(M1)
    tied = work_of(ModelConfig.from_dict({**raw, "tie_word_embeddings": True}), "bfloat16")
    assert tied == work_of(ModelConfig.from_dict(raw), "bfloat16")


def test_bounds_of_one_request() -> None:
    found = bound(SMALL, MACHINE, 1, prompt_tokens=100, output_tokens=20)
    # A step: 2 GB shared, 2 layers of 2 experts of 0.5 GB, 110 tokens of KV of 1 MB each; 4 GFLOP take 0.04 s only.
    assert found.read_bytes_per_step == pytest.approx(4.11e9)
    assert found.decode_tokens_per_s == pytest.approx(1 / 0.411)
    # Prefill: 301 GFLOP take 3.01 s, all 10 GB 1 s. Then 19 steps.
    assert found.tokens_per_s == pytest.approx(20 / (3.01 + 19 * 0.411))


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    found = bound(SMALL, MachineSpeed(1000, 100), 50, prompt_tokens=100, output_tokens=20)
    assert found.decode_tokens_per_s == pytest.approx(100e9 / 4e9)
    assert found.tokens_per_s == pytest.approx(50 * 20 / (50 * 3.01 + 19 * 50 * 0.04))


def test_a_row() -> None:
    options = RooflineOptions(prompt_tokens=100, output_tokens=20)
    row = roofline_row(options, 1, SMALL, MACHINE, [Rates(0.8, 1.5), Rates(0.5, 0.9), Rates(1.0, None)])
    assert row["reached_tokens_per_s"] == 0.8
    assert row["reached_decode_tokens_per_s"] == 1.2
    assert row["bound_decode_tokens_per_s"] == 2.43
    assert row["read_mib_per_step"] == round(4.11e9 / 2**20, 1)
    assert row["fraction"] == pytest.approx(0.8 / (20 / (3.01 + 19 * 0.411)), abs=1e-4)
    unseen = roofline_row(options, 1, SMALL, MACHINE, [Rates(0.8, None)])
    assert unseen["reached_decode_tokens_per_s"] is None
    drawn = curves(Report("roofline", [row], {})).rows
    assert [(each["what"], each["tokens_per_s"]) for each in drawn] == [
        ("bound", row["bound_tokens_per_s"]),
        ("reached", row["reached_tokens_per_s"]),
    ]


def test_middle_and_shapes() -> None:
    assert middle([MachineSpeed(1, 30), MachineSpeed(2, 20), MachineSpeed(9, 10)]) == MachineSpeed(2, 20)
    assert matmul_shapes(ModelConfig.from_dict(config_json(M1))) == [
        (512, 1024, 1024),
        (128, 1024, 7168),
        (128, 3584, 1024),
    ]
