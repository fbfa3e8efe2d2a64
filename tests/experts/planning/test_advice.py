"""The search finds what it should, and each rule of the advice has its case."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_ray.errors import ConfigError
from moe_ray.experts.planning import advice
from moe_ray.experts.planning.advice import Situation, advise
from moe_ray.experts.planning.card_table import CARD_SHEETS, card_named
from moe_ray.experts.planning.cards import MEMORY_GIB
from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.experts.planning.machines import Device, Machines, Spread
from moe_ray.experts.planning.model_cost import Matrices, ModelCost
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.rates import DataSheet
from moe_ray.experts.planning.search import PlanFor, candidate, search
from moe_ray.model.compute.resolve import Machine, Wanted, resolve
from moe_ray.model.formats import FLOATS
from moe_ray.model.formats.held import QUANTIZATIONS, HeldAs
from moe_ray.model.model_config import ModelConfig

EXAMPLE = Path(__file__).parents[3] / "examples" / "mixtral-8x7b" / "config.json"
MIXTRAL = ModelConfig.from_dict(json.loads(EXAMPLE.read_text(encoding="utf-8")))


def costs(*forms: str, dtype: str = "bfloat16") -> dict[str, ModelCost]:
    """Mixtral-8x7B in these formats."""
    found = {}
    for form in forms:
        held = HeldAs(dtype, form if form in QUANTIZATIONS else None)
        found[form] = ModelCost.of(MIXTRAL, dtype, WeightsHeld(held, dict.fromkeys(range(8), held)))
    return found


def cards(*named: tuple[str, int], price: float | None = None, network: Network | None = None) -> Machines:
    """Cards of the table, each in a host of its own."""
    devices: list[Device] = []
    for name, count in named:
        known, sheet = card_named(name)
        for _ in range(count):
            rates, memory = DataSheet(sheet.read_gb_s, sheet.tflops()), sheet.gib * 2**30
            has = sheet.bfloat16 is not None
            devices.append(Device(known, len(devices), memory, rates, has_bfloat16=has, price_per_hour=price))
    return Machines(tuple(devices), network or Network())


def situation(machines: Machines, *forms: str, asked: PlanFor | None = None, dtype: str = "bfloat16") -> Situation:
    wanted = asked or PlanFor()
    return Situation(search(costs(*forms, dtype=dtype), machines, wanted, (1,)), machines, wanted)


def test_a_model_that_one_card_holds_is_not_pulled_apart() -> None:
    found = situation(cards(("H200", 1)), "bfloat16")
    assert found.best.spread.in_process
    said = advise(found)[0]
    assert said.startswith("Do not pull this model apart here: one H200-141GB holds it in bfloat16, with ")
    assert f"{found.best.kv_tokens:,} KV tokens" in said
    assert found.best.kv_tokens == pytest.approx((0.9 * 141 * 2**30 - 93.4e9 - 2**29) / 131_072, rel=1e-3)


def test_small_cards_hold_it_apart() -> None:
    found = situation(cards(("L4", 9)), "bfloat16")
    assert not found.best.spread.in_process
    assert len(found.best.spread.used) >= 5, "93 GB on cards of 24"
    assert "no single device here holds it" in advise(found)[0]


def test_every_format_that_is_planned_is_computed_on_cards() -> None:
    """So a placement in any of them is one that `moe-ray serve` starts."""
    card = Machine(frozenset(), cuda=True, capability=(8, 0), triton="compiles")
    for form in (*FLOATS, *QUANTIZATIONS):
        wanted = Wanted(quantize=form) if form in QUANTIZATIONS else Wanted(dtype=form)
        backend = resolve(MIXTRAL, wanted, card)
        assert (backend.trunk, backend.experts, backend.missing) == ("triton", "triton", ())
        assert form in QUANTIZATIONS or backend.dtype == form


def test_what_does_not_fit_is_refused_with_what_each_format_needs() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16 needs 93\.4 GB of weights and 4\.3 GB of KV cache"):
        situation(cards(("L4", 2)), "bfloat16")
    with pytest.raises(ConfigError, match="every machine needs a price"):
        situation(cards(("H200", 1)), "bfloat16", asked=PlanFor(objective="cost"))


def test_the_objectives_differ() -> None:
    """For the least cost fewer cards serve; a price of 2 an hour and 500 tokens/s are 1.11 a million."""
    machines = cards(("A100-80G", 8), price=2.0)
    cheap, fast = (situation(machines, "bfloat16", asked=PlanFor(objective=o)).best for o in ("cost", "tokens"))
    assert len(cheap.spread.used) < len(fast.spread.used)
    assert fast.steps[32].tokens_per_s > cheap.steps[32].tokens_per_s
    price = cheap.price_per_million(32)
    assert price == pytest.approx(2.0 * len(cheap.spread.used) / 3600 / cheap.steps[32].tokens_per_s * 1e6)
    quick = situation(machines, "bfloat16", asked=PlanFor(objective="latency")).best
    assert quick.steps[1].seconds <= fast.steps[1].seconds


def test_a_slow_network_is_named() -> None:
    found = situation(cards(("L4", 9), network=Network(2.0)), "bfloat16")
    said = advice.network(found)
    assert said is not None
    assert "The network's latency is " in said
    share = found.best.steps[1].network_share
    assert f"{share:.0%} of a step at 1 sequence at once" in said
    assert share == pytest.approx(32 * 4e-3 / (32 * 4e-3 + found.best.steps[1].trunk_s
        + found.best.steps[1].experts_s + found.best.steps[1].carrier_s), rel=0.05)  # fmt: skip
    thin = advice.network(situation(cards(("L4", 9), network=Network(0.0, 0.05)), "bfloat16"))
    assert thin is not None
    assert "bandwidth" in thin
    assert advice.network(situation(cards(("L4", 9)), "bfloat16")) is None


def test_the_bottleneck_is_named() -> None:
    slow = situation(cards(("T4", 9)), "float16", dtype="float16")
    assert "The experts are " in (advice.bottleneck(slow) or "")
    machines = cards(("H100", 9))
    weak = replace(machines.devices[0], rates=DataSheet(50, {"bfloat16": 30, "float32": 4}), name="weak")
    machines = Machines((weak, *machines.devices[1:]))
    asked, spread = PlanFor((16,), 4096), Spread((0,), tuple((1 + expert,) for expert in range(8)))
    (cost,) = costs("bfloat16").values()
    found = Situation([candidate("bfloat16", cost, machines, spread, asked)], machines, asked)
    said = advice.bottleneck(found)
    assert said is not None
    busy = found.best.steps[16].expert_busy
    assert f"The trunk is the bottleneck at 16 sequences at once: the experts' devices wait {1 - busy:.0%}" in said
    searched = situation(machines, "bfloat16", asked=asked).best.spread
    assert 0 not in searched.trunks, "the search does not put a trunk on the weak card"


def test_small_experts_that_are_apart_are_named() -> None:
    machines, asked = cards(("H200", 1), ("L4", 8)), PlanFor((32,))
    spread = Spread((0,), tuple((1 + expert,) for expert in range(8)))
    (cost,) = costs("bfloat16").values()
    small = replace(cost, expert=Matrices("bfloat16", 10**6, 2 * 10**6))
    for each, named in ((cost, False), (small, True)):
        found = Situation([candidate("bfloat16", each, machines, spread, asked)], machines, asked)
        said = advice.calls(found)
        assert (said is not None) == named
        assert said is None or "Carrying calls to the experts is " in said


def test_a_hot_expert_is_named() -> None:
    shares = (1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0)
    found = situation(cards(("L4", 9)), "bfloat16", asked=PlanFor(shares=shares))
    said = advice.hot_experts(found)
    assert said is not None
    assert said.startswith("Expert 3 has 2.9x the mean load: add a replica")
    assert "{3: {num_replicas: 2}}" in said
    assert advice.hot_experts(situation(cards(("L4", 9)), "bfloat16", asked=PlanFor(shares=(1.0,) * 8))) is None


def test_cards_without_bfloat16_are_named() -> None:
    found = situation(cards(("T4", 9)), "float16", dtype="float16")
    assert advice.dtype(found) == "T4-16GB has no bfloat16: float16 is planned; start with --dtype float16."
    assert advice.dtype(situation(cards(("L4", 9)), "bfloat16")) is None


def test_what_is_not_needed_is_named() -> None:
    found = situation(cards(("H200", 1), ("T4", 3)), "float16", asked=PlanFor((1,)), dtype="float16")
    assert "3 x T4-16GB would add nothing at 1 sequence at once" in (advice.idle_devices(found) or "")
    assert "a trunk computes 64 in a step" in (advice.sequences(found) or "")


def test_processes_that_share_cores_are_named() -> None:
    rates = DataSheet(40, {"bfloat16": 0.1, "float32": 0.1}, cores=2, is_cpu=True)
    host = Device("cpu:2", 0, 60 * 2**30, rates, is_cpu=True)
    machines = Machines((host, replace(host, host=1)))
    found = situation(machines, "bfloat16", asked=PlanFor((1,)))
    said = advice.shared_cores(found)
    assert said is not None
    assert "processes share the 2 cores of one cpu:2" in said


def test_the_table_of_cards_is_the_one_of_memory() -> None:
    """Cards that Ray names are of the same size in both tables."""
    for name, sheet in CARD_SHEETS.items():
        kind = name.partition("-")[0]
        if kind in MEMORY_GIB:
            assert sheet.gib >= MEMORY_GIB[kind]
        assert name.endswith(f"-{sheet.gib}GB")
    with pytest.raises(ConfigError, match="'A100' may be A100-40GB or A100-80GB"):
        card_named("A100")
    with pytest.raises(ConfigError, match="no card is known as 'Z9'; known cards: P100-16GB, "):
        card_named("Z9")
