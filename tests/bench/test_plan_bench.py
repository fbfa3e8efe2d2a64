"""`moe-ray bench plan`: what the probe's figures become, what is predicted by them, and one small real comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backends import BEST

from moe_ray.bench import machine_probe, software_probe
from moe_ray.bench.lab.emulate import ServiceTime
from moe_ray.bench.lab.plan_emulated import (
    CALIBRATED,
    EMULATED,
    SHAPED,
    EmulatedPlacement,
    carrier_overhead,
    compared,
    emulated_rows,
)
from moe_ray.bench.lab.plan_validation import PlanBenchOptions, predicted_rate, summary
from moe_ray.bench.m1 import config_json
from moe_ray.bench.machine_probe import ROWS, probe_from_json, probed_machine
from moe_ray.bench.roofline import distinct_experts
from moe_ray.bench.software_probe import fitted
from moe_ray.commands.advised import machines_of
from moe_ray.config import load_config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.planning.model_cost import ModelCost
from moe_ray.experts.planning.rates import Overhead
from moe_ray.model.model_config import ModelConfig

SHAPE = {
    **{"model_type": "mixtral", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "torch_dtype": "bfloat16"},
}
KEPT: dict[str, Any] = {
    "rows": list(ROWS),
    "experts": {
        form: {mode: [float(rows) for rows in ROWS] for mode in ("alone", "crowded", "pooled")}
        for form in machine_probe.FORMS
    },
    "trunk": {form: [2.0 * rows for rows in ROWS] for form in machine_probe.FORMS},
    "attention_ns": {"64": 1.0, "128": 2.0},
    "software": {
        name: {"base_us": 100.0, "per_call_us": 10.0, "per_row_us": 1.0} for name in ("local", "spread", "step")
    },
}


def quiet(*_: object) -> None:
    pass


def kept(cache_dir: Path) -> Path:
    """A probe's result in `cache_dir`, as of this machine."""
    facts = machine_probe.machine_facts()
    key = [machine_probe.VERSION, facts["cpu"], facts["cores"], facts["moe_ray"]]
    cache_dir.mkdir(exist_ok=True)
    path = cache_dir / "machine-probe.json"
    path.write_text(json.dumps({"key": key, "facts": facts, **KEPT}))
    return path


def test_what_is_kept_is_used_until_the_machine_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept(tmp_path)
    probed = probed_machine(tmp_path, quiet)
    assert probed.rates.expert_s("int8", 10**9, 0, 4, 2) == pytest.approx(4.0)
    assert probed.rates.trunk_s("float16", 10**9, 0, 4) == pytest.approx(8.0)
    assert probed.rates.trunk_s("float32", 10**9, 0, 4) == pytest.approx(16.0), "twice the bytes of bfloat16"
    assert probed.rates.attention_s(10, 64, 80, 0) == pytest.approx(10 * 64 / 1e9), "the nearest head is of 64"
    machines = machines_of("here", None, load_config({"cache_dir": str(tmp_path)}), False, quiet)
    assert [(each.measured, each.is_cpu) for each in machines.devices] == [(True, True)]
    measured: list[int] = []
    monkeypatch.setattr(machine_probe, "_measure", lambda *_: measured.append(1) or KEPT)
    probed_machine(tmp_path, quiet)
    assert not measured
    path.write_text(path.read_text().replace(f'"key": [{machine_probe.VERSION}', '"key": [0'))
    probed_machine(tmp_path, quiet)
    probed_machine(tmp_path, quiet, again=True)
    assert len(measured) == 2
    path.write_text("half a fi")
    probed_machine(tmp_path, quiet)
    assert len(measured) == 3


def test_overhead_is_fitted_exactly_where_it_is_of_that_form() -> None:
    truth = Overhead(50.0, 7.0, 0.5)
    points = [(calls, rows, truth.seconds(calls, 0 if rows < 64 else rows)) for calls, rows in ((2, 2), (7, 16))]
    found = fitted([*points, (8.0, 64.0, truth.seconds(8, 62))])
    assert (found.base_us, found.per_call_us, found.per_row_us) == pytest.approx((50, 7, 0.5))
    assert fitted([(2, 2, 3e-4), (7, 16, 1e-4), (8, 64, 1e-4)]).per_call_us == 0, "noise makes nothing negative"


def test_the_end_of_a_wave_has_fewer_sequences() -> None:
    """Prompts that take several steps: the first sequences end first, and the mean step is smaller than the largest."""
    probed = probe_from_json({**KEPT, "facts": {"cores": 2}})
    cost = ModelCost.of(ModelConfig.from_dict(SHAPE), "bfloat16", WeightsHeld.all_in("bfloat16"))
    one_chunk = PlanBenchOptions(prompt_tokens=16, output_tokens=64)
    chunks = PlanBenchOptions(prompt_tokens=128, output_tokens=64)
    assert predicted_rate(cost, probed, True, 32, chunks) < predicted_rate(cost, probed, True, 32, one_chunk)
    alone = predicted_rate(cost, probed, True, 1, one_chunk)
    assert alone == pytest.approx(predicted_rate(cost, probed, True, 1, PlanBenchOptions(prompt_tokens=16)), rel=0.2)


def test_the_summary_counts_what_is_close() -> None:
    rows = [compared("a", 1, 10.0, 10.5), compared("a", 8, 10.0, 20.0), compared("b", 1, 11.0, 10.0)]
    assert [row["error"] for row in rows] == [-0.048, -0.5, 0.1]
    found = summary(rows)
    assert (found["placements"], found["within_10_percent"], found["worst"]) == (3, 2, "a at 8")


@pytest.mark.parametrize("truth", [Overhead(900, 180), Overhead(900, 220, 30), Overhead(0, 50, 1)])
def test_a_carrier_of_that_form_is_found_exactly(truth: Overhead) -> None:
    layers = [truth.seconds(distinct_experts(experts, 2, tokens), 2 * tokens) for experts, tokens in CALIBRATED]
    found = carrier_overhead(layers)
    assert (found.base_us, found.per_call_us, found.per_row_us) == pytest.approx(
        (truth.base_us, truth.per_call_us, truth.per_row_us), abs=1e-6
    )


def test_noise_makes_no_part_of_a_carrier_negative() -> None:
    for layers in ([3e-3, 2e-3, 1e-3], [1e-3, 2e-3, 1e-3], [1e-3, 5e-4, 4e-3]):
        found = carrier_overhead(layers)
        assert min(found.base_us, found.per_call_us, found.per_row_us) >= 0


def test_sleeps_that_end_late_are_the_emulations() -> None:
    placement = EmulatedPlacement(4, 64, ServiceTime(1000, 0), trunk_us=500)
    assert placement.predicted(Overhead(), 100.0, 30.0).seconds == pytest.approx(4 * 1.63e-3)


def test_the_emulated_placements_are_predicted_from_what_is_told() -> None:
    nothing = Overhead()
    plain = EmulatedPlacement(4, 64, ServiceTime(1000, 0), trunk_us=500).predicted(nothing)
    assert plain.seconds == pytest.approx(4 * 1.5e-3)
    assert len({placement.name for placement in (*EMULATED, *SHAPED)} | {""}) == len(EMULATED) + len(SHAPED) + 1
    for placement in SHAPED:
        assert placement.link is not None
        assert placement.predicted(nothing).network_s > 4 * 2 * placement.link.latency_ms / 1e3 * 0.99


@pytest.mark.slow
def test_one_placement_is_really_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_ray.bench.lab.plan_emulated.WARM_S", 0.2)
    slow = EmulatedPlacement(4, 4, ServiceTime(20_000, 0), trunk_us=5000)
    (row,) = emulated_rows((slow,), load_config().cache_dir, 0.5, quiet)
    for figure in ("predicted_ms", "measured_ms"):  # how close they are, a busy machine does not tell
        assert float(row[figure] or 0) >= 4 * 25, "four layers, nothing overlaps"
    assert row["error"] == pytest.approx(float(row["predicted_ms"] or 0) / float(row["measured_ms"] or 1) - 1, abs=0.01)


def test_what_products_take_is_taken_away_from_the_softwares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take what their products take and something beside: that is found, whatever the products are."""
    truth = {"local": Overhead(300, 200, 5), "socket": Overhead(600, 50, 7)}
    few, many = software_probe.LAYERS
    monkeypatch.setattr(software_probe, "_directory", lambda _cache, layers, _progress: tmp_path / str(layers))
    for layers in (few, many):
        directory = tmp_path / str(layers)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config_json(software_probe.small(layers))))
    products = replace(
        probe_from_json({"facts": {"cores": 2}, **KEPT}).rates, local=Overhead(), spread=Overhead(), step=Overhead()
    )

    def steps(directory: Path, _progress: object) -> dict[str, list[float]]:
        layers, told = int(directory.name), software_probe._products_s(directory, products)
        return {
            carrier: [
                step + layers * overhead.seconds(software_probe.calls(n), 2 * n) + 1e-3 + 1e-4 * n
                for step, n in zip(told[carrier], software_probe.SEQUENCES, strict=True)
            ]
            for carrier, overhead in truth.items()
        }

    monkeypatch.setattr(software_probe, "_step_s", steps)
    found = software_probe.measure_software(tmp_path, products, quiet)
    for name, carrier in (("local", "local"), ("spread", "socket")):
        assert Overhead(**found[name]).seconds(5, 20) == pytest.approx(truth[carrier].seconds(5, 20), rel=0.05)
    assert found["step"] == {"base_us": pytest.approx(1000), "per_call_us": 0.0, "per_row_us": pytest.approx(100)}


@pytest.mark.skipif(BEST is None, reason="no native kernels for this machine")
def test_kernels_are_timed_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROTATION_BYTES", 1), ("HIDDEN", 128), ("INNER", 128), ("ROWS", (1, 8)), ("LEAST_S", 0.0005)):
        monkeypatch.setattr(machine_probe, name, value)
    monkeypatch.setattr(machine_probe, "REPEATS", 1)
    kernels = [machine_probe.open_kernels((), threads)[0] for threads in (2, 1, 1)]
    for form in machine_probe.FORMS:
        modes = machine_probe._expert_curves(form, kernels[0], kernels[1:])
        assert set(modes) == {"alone", "crowded", "pooled"}
        assert all(len(ns) == 2 and min(ns) > 0 for ns in modes.values())
        assert min(machine_probe._trunk_curve(form, kernels[0])) > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (PlanBenchOptions(parts=("moon",)), "--parts: moon; allowed: engine, emulated, networks"),
        (PlanBenchOptions(formats=("int3",)), "--formats: int3; allowed: float, int8, int4, nf4"),
        (PlanBenchOptions(parts=("engine",), output_tokens=4), "--output-tokens: must be at least 8"),
    ],
)
def test_what_cannot_be_asked_for(options: PlanBenchOptions, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.check()
    assert str(caught.value) == why
