"""`moe-ray bench kernels` and `attention`: all that is asked for by instruction set, and what cannot be asked for."""

from __future__ import annotations

import pytest
from backends import BEST, HERE

from moe_ray.bench.attention import AttentionOptions, run_attention
from moe_ray.bench.kernels import KernelOptions, run_kernels
from moe_ray.errors import ConfigError


def quiet(*_: object) -> None:
    pass


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
def test_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ray.bench.kernels.ROTATION_BYTES", 2**20)
    monkeypatch.setattr("moe_ray.bench.kernels.LEAST_S", 0.001)
    monkeypatch.setattr("moe_ray.bench.probe.PROBE_BYTES", 2**24)
    names = (HERE[0], HERE[-1])
    options = KernelOptions(names, ("float32", "int4"), (1, 3), 64, 128, threads=1, repeats=2, any_order=True)
    report = run_kernels(options, quiet)
    ours = [f"{name} {form}" for name in names for form in ("float32", "int4")]
    assert [(row["what"], row["rows"]) for row in report.rows] == [
        (what, rows) for what in (*ours, "torch float32", "torch bfloat16") for rows in (1, 3)
    ]
    assert all(float(row[key] or 0) > 0 for row in report.rows for key in ("ms", "gb_per_s", "gflop_per_s"))
    assert all(0 <= float(row["share_of_bare_loop"] or 0) < 2 for row in report.rows), "few and short rows reach little"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (KernelOptions(("sse9",)), "--kernels: 'sse9' is none of avx512_bf16"),
        (KernelOptions(formats=("int3",)), "--formats: 'int3' is none of float32"),
        (KernelOptions(inputs=100), "--inputs: must be a multiple of 128, got 100"),
    ],
)
def test_what_cannot_be_asked_for(options: KernelOptions, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run_kernels(options, quiet)


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
def test_attention_by_cache_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ray.bench.kernels.LEAST_S", 0.001)
    names, caches = (HERE[0], HERE[-1]), ("float16", "fp8")
    options = AttentionOptions(names, caches, (5, 33), 3, heads=4, kv_heads=2, head_dim=32, threads=1, repeats=2)
    report = run_attention(options, quiet)
    assert [(row["what"], row["context"]) for row in report.rows] == [
        (f"{name} {cache}", context) for context in (5, 33) for name in names for cache in caches
    ]
    assert all(float(row["ms"] or 0) > 0 for row in report.rows)


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (AttentionOptions(("sse9",)), "--kernels: 'sse9' is none of avx512_bf16"),
        (AttentionOptions(caches=("int4",)), "--caches: 'int4' is none of float32, bfloat16, float16, int8, fp8"),
        (AttentionOptions(head_dim=48), "--head-dim: no attention for 32 query heads and 8 KV heads of 48"),
    ],
)
def test_attention_that_cannot_be_asked_for(options: AttentionOptions, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run_attention(options, quiet)
