"""`moe-ray bench kernels`: every format on every instruction set asked for, and what cannot be asked for."""

from __future__ import annotations

import pytest
from backends import BEST, HERE

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
    report = run_kernels(KernelOptions(names, ("float32", "int4"), (1, 3), 64, 128, threads=1, repeats=2), quiet)
    assert [(row["what"], row["rows"]) for row in report.rows] == [
        (f"{name} {form}", rows) for name in names for form in ("float32", "int4") for rows in (1, 3)
    ]
    assert all(
        float(row[key] or 0) > 0
        for row in report.rows
        for key in ("ms", "gb_per_s", "gflop_per_s", "share_of_bare_loop")
    )


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
