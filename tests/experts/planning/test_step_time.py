"""The cost model of a step: what is known in closed form comes out, and every part does what it is there for."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from published_configs import CONFIGS

from moe_ray.bench.lab.emulate import popularity
from moe_ray.experts.planning.footprint import WeightsHeld, make_plan
from moe_ray.experts.planning.machines import Device, Machines, Spread
from moe_ray.experts.planning.model_cost import NOTHING, Matrices, ModelCost
from moe_ray.experts.planning.network_step import Network, network_step
from moe_ray.experts.planning.rates import COMPUTE_SHARE, READ_SHARE, Curve, DataSheet, Measured, Overhead, ToldRates
from moe_ray.experts.planning.routing import rows_of_layers
from moe_ray.experts.planning.step_time import StepTime, decode_step, prefill_s
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.model_config import ModelConfig

EXAMPLE = Path(__file__).parents[3] / "examples" / "mixtral-8x7b" / "config.json"
MIXTRAL = ModelConfig.from_dict(json.loads(EXAMPLE.read_text(encoding="utf-8")))


def told(experts: int, top_k: int, layers: int = 4, row_bytes: int = 100) -> ModelCost:
    """A model of which nothing but its experts takes time."""
    expert = Matrices("float32", 1, 1)
    return ModelCost(layers, experts, top_k, NOTHING, NOTHING, expert, NOTHING, 1, 1, 1, row_bytes, 0, 0)


def fleet(trunk: ToldRates, replica: ToldRates, count: int, host: int = 0, network: Network | None = None) -> Machines:
    """A trunk on host 0, and devices for experts."""
    devices = [Device("trunk", 0, 2**40, trunk), *(Device("expert", host, 2**40, replica) for _ in range(count))]
    return Machines(tuple(devices), network or Network())


def each_its_own(experts: int) -> Spread:
    return Spread((0,), tuple((1 + expert,) for expert in range(experts)))


def test_the_parts_add_up() -> None:
    """All 8 experts get every token: nothing is left to chance."""
    machines = fleet(ToldRates(0, 0, 1000, Overhead(100, 10, 1)), ToldRates(2000, 50), 8)
    step = decode_step(told(8, 8), machines, each_its_own(8), 4, 100)
    per_layer = 1e-3 + (100 + 10 * 8 + 1 * 32) / 1e6 + (2000 + 50 * 4) / 1e6
    assert step.seconds == pytest.approx(4 * per_layer)
    assert step.micro_batches == 1, "halves of a batch would take the experts almost as long"
    assert step.trunk_s + step.experts_s + step.carrier_s + step.network_s == pytest.approx(4 * per_layer)
    assert step.tokens_per_s == pytest.approx(4 / step.seconds)


def test_layers_without_experts_are_the_trunk_s() -> None:
    """Nothing of them is sent, waited for or computed by experts, whatever the number of micro-batches."""
    network = Network(2.0, 1.0)
    trunk, replica = ToldRates(0, 0, 1000, Overhead(100, 10, 1)), ToldRates(2000, 50)
    machines, spread = fleet(trunk, replica, 8, host=1, network=network), each_its_own(8)
    for micro in (1, 2):
        all_of_experts = decode_step(told(8, 8), machines, spread, 4, 100, micro_batches=micro)
        with_two_more = replace(told(8, 8, layers=6), dense_layers=2)
        step = decode_step(with_two_more, machines, spread, 4, 100, micro_batches=micro)
        assert step.seconds - all_of_experts.seconds == pytest.approx(2 * micro * 1e-3)
        assert step.trunk_s - all_of_experts.trunk_s == pytest.approx(2 * micro * 1e-3)
        for part in ("experts_s", "carrier_s", "network_s"):
            assert getattr(step, part) == getattr(all_of_experts, part)


@pytest.mark.parametrize(
    ("name", "layers", "dense", "inner"), [("DeepSeek-V2-Lite", 27, 1, 10944), ("DeepSeek-V3", 61, 3, 18432)]
)
def test_a_model_whose_first_layers_have_no_experts(name: str, layers: int, dense: int, inner: int) -> None:
    model = ModelConfig.from_dict(CONFIGS[name])
    cost = ModelCost.of(model, "bfloat16", WeightsHeld.all_in("bfloat16"))
    assert (cost.layers, cost.dense_layers, cost.mixture_layers) == (layers, dense, layers - dense)
    shared = 3 * model.hidden_size * (model.shared_intermediate_size or 0)
    assert shared > 0
    attention = cost.attention.weights - shared
    assert cost.dense.weights == attention + 3 * inner * model.hidden_size
    whole = cost.trunk_bytes + cost.num_experts * cost.expert_bytes
    assert whole == make_plan(model, "bfloat16").total_bytes
    of_layers = cost.mixture_layers * (cost.attention.nbytes + cost.router.nbytes)
    of_layers += cost.dense_layers * cost.dense.nbytes
    assert cost.trunk_bytes == pytest.approx(of_layers + 2 * cost.head.nbytes, rel=1e-3), "norms are the rest"


def test_a_trunk_waits_for_a_round_trip_and_writes_the_calls_itself() -> None:
    """Another micro-batch passes while it waits: of a carrier's time, what every layer takes once."""
    machines = fleet(ToldRates(0, 0, 3000, Overhead(400, 50)), ToldRates(2000, 0), 8)
    two = decode_step(told(8, 8), machines, each_its_own(8), 8, 100, micro_batches=2)
    assert two.seconds == pytest.approx(4 * 2 * (3e-3 + 8 * 50e-6))


def test_rows_are_written_while_earlier_ones_are_sent() -> None:
    """The shorter of the two hides, but for one call's; all 8 experts get every token."""
    cost = told(8, 8, 4, 10_000)
    for per_row_us, shorter in ((5.0, 5.0), (500.0, 80.032)):  # 10,004 bytes a row at 1 Gbit/s
        near, far = (
            decode_step(
                cost,
                fleet(ToldRates(0, 0, 0, Overhead(0, 0, per_row_us)), ToldRates(1000, 0), 8, 1, network),
                each_its_own(8),
                4,
                1,
                micro_batches=1,
            )
            for network in (Network(0.2), Network(0.2, 1.0))
        )
        sent = far.network_s - near.network_s
        assert far.seconds == pytest.approx(near.seconds + sent - 4 * 32 * shorter / 1e6 * 7 / 8)


def test_micro_batches_hide_the_shorter_part() -> None:
    """Ping-pong of two: a layer takes as long as the trunk, twice, where it is the longer part."""
    machines = fleet(ToldRates(0, 0, 3000), ToldRates(2000, 0), 8)
    two = decode_step(told(8, 8), machines, each_its_own(8), 8, 100, micro_batches=2)
    assert two.seconds == pytest.approx(4 * 2 * 3e-3)
    three = decode_step(
        told(8, 8), fleet(ToldRates(0, 0, 100), ToldRates(5000, 0), 8), each_its_own(8), 9, 1, micro_batches=3
    )
    assert three.seconds == pytest.approx(4 * 3 * 5e-3), "experts are busy all the time"


def test_a_network_carries_both_directions_at_once() -> None:
    """The bytes of `network_step.network_step`, for rows and calls that are not left to chance."""
    model = replace(MIXTRAL, num_experts_per_tok=8)
    cost = told(8, 8, model.num_hidden_layers, model.hidden_size * 2)
    network = Network(0.2, 1.0)
    near = decode_step(cost, fleet(ToldRates(0, 0), ToldRates(1000, 0), 8), each_its_own(8), 16, 1, micro_batches=1)
    machines = fleet(ToldRates(0, 0), ToldRates(1000, 0), 8, host=1, network=network)
    far = decode_step(cost, machines, each_its_own(8), 16, 1, micro_batches=1)
    counted = network_step(model, "float16", network, 16)
    added = (counted.latency_ms + 8 * (counted.bytes_out + counted.bytes_in / 8) / 1e6) / 1e3
    assert far.seconds - near.seconds == pytest.approx(added, rel=1e-6)
    assert far.network_share == pytest.approx(added / far.seconds)


def test_devices_that_are_shared_take_turns() -> None:
    """Two lanes compute eight calls in four rounds; one device for all eight in eight."""
    cost, trunk = told(8, 8), ToldRates(0, 0)
    one = fleet(trunk, ToldRates(1000, 0), 1)
    assert decode_step(cost, one, Spread((0,), ((1,),) * 8), 1, 1).seconds == pytest.approx(4 * 8e-3)
    two = fleet(trunk, ToldRates(1000, 0, lanes=2), 1)
    assert decode_step(cost, two, Spread((0,), ((1,),) * 8), 1, 1).seconds == pytest.approx(4 * 4e-3)


def test_replicas_share_what_computing_takes() -> None:
    cost = told(4, 4)
    homes = tuple((1 + expert, 5 + expert) for expert in range(4))
    by_rows = fleet(ToldRates(0, 0), ToldRates(0, 1000), 8)
    assert decode_step(cost, by_rows, Spread((0,), homes), 8, 1, micro_batches=1).seconds == pytest.approx(4 * 4e-3)
    by_reading = fleet(ToldRates(0, 0), ToldRates(1000, 0), 8)
    assert decode_step(cost, by_reading, Spread((0,), homes), 8, 1, micro_batches=1).seconds == pytest.approx(4e-3)


def test_trunks_share_the_experts() -> None:
    """Two trunks that wait more than they compute make nearly twice the tokens; then the experts are busy."""
    replica = ToldRates(1000, 0)
    devices = [Device("trunk", 0, 2**40, ToldRates(0, 0, 1000)) for _ in range(2)]
    machines = Machines((*devices, *(Device("expert", 0, 2**40, replica) for _ in range(2))))
    homes = ((2,), (3,))
    one = decode_step(told(2, 2), machines, Spread((0,), homes), 8, 1, micro_batches=1)
    two = decode_step(told(2, 2), machines, Spread((0, 1), homes), 16, 1, micro_batches=1)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    assert two.expert_busy == pytest.approx(1.0)


def test_a_card_follows_the_roofline() -> None:
    """Mixtral-8x7B's expert of a layer: 352 MB in 16 bits, so many operations a row."""
    cost = ModelCost.of(MIXTRAL, "bfloat16", WeightsHeld.all_in("bfloat16"))
    h100 = DataSheet(3350, {"bfloat16": 989, "float32": 67})
    e = cost.expert
    assert e.nbytes == 3 * 4096 * 14336 * 2
    assert h100.expert_s(e.form, e.weights, e.nbytes, 1, 1) == pytest.approx(e.nbytes / (READ_SHARE * 3350e9))
    many = h100.expert_s(e.form, e.weights, e.nbytes, 4096, 1)
    assert many == pytest.approx(2 * e.weights * 4096 / (COMPUTE_SHARE * 989e12))
    assert cost.kv_bytes_per_token == 131_072
    total = cost.trunk_bytes + cost.num_experts * cost.expert_bytes
    assert round(total / 1e9, 1) == 93.4


def test_a_format_is_read_faster() -> None:
    quantised = HeldAs("bfloat16", "int4")
    held = WeightsHeld(quantised, dict.fromkeys(range(8), quantised))
    card = Device("H100", 0, 80 * 2**30, DataSheet(3350, {"bfloat16": 989, "float32": 67}))
    spread = Spread((0,), ((0,),) * 8, True)
    steps = [
        decode_step(ModelCost.of(MIXTRAL, "bfloat16", each), Machines((card,)), spread, 1, 1024)
        for each in (WeightsHeld.all_in("bfloat16"), held)
    ]
    assert steps[0].experts_s / steps[1].experts_s == pytest.approx(16 / 4.5), "a scale of 16 bits for 32 of 4"
    assert steps[0].seconds / steps[1].seconds < 16 / 4.5, "software takes as long in both"


def test_a_step_takes_longer_with_more_to_do() -> None:
    machines = Machines((Device("T4", 0, 2**40, DataSheet(320, {"float16": 65, "float32": 8.1})),))
    cost = ModelCost.of(MIXTRAL, "float16", WeightsHeld.all_in("float16"))
    spread = Spread((0,), ((0,),) * 8, True)
    assert all(
        few < many
        for few, many in pairwise(decode_step(cost, machines, spread, n, 512).seconds for n in (1, 4, 16, 64))
    )
    contexts = [decode_step(cost, machines, spread, 8, context).seconds for context in (128, 4096, 32768)]
    assert contexts == sorted(contexts)
    assert prefill_s(cost, machines, spread, 1024) > prefill_s(cost, machines, spread, 512)


def test_measured_curves_are_used() -> None:
    curve, half = Curve((1, 128), (1.0, 10.0)), Curve((1, 128), (0.5, 5.0))
    overhead = Overhead()
    rates = Measured(2, {"int8": (half, curve, half)}, {"int8": curve}, {128: 0.1}, overhead, overhead, overhead)
    assert rates.expert_s("int8", 10**9, 0, 1, 2) == pytest.approx(1.0)
    assert rates.expert_s("int8", 10**9, 0, 1, 1) == rates.expert_s("int8", 10**9, 0, 1, 0) == pytest.approx(0.5)
    assert rates.trunk_s("int8", 10**9, 0, 256) == pytest.approx(20.0), "beyond the last point, in proportion"


def test_draws_are_those_of_tokens_that_choose_different_experts() -> None:
    layers = rows_of_layers(8, 2, 16)
    assert all(sum(rows) == 32 and max(rows) <= 16 for rows in layers)
    assert layers == rows_of_layers(8, 2, 16)
    (mean,) = rows_of_layers(8, 2, 4096)
    assert mean == (1024.0,) * 8
    hot = rows_of_layers(8, 2, 64, (9, 1, 1, 1, 1, 1, 1, 1))
    assert all(rows[0] == max(rows) for rows in hot)
    assert sum(rows[0] for rows in hot) / len(hot) > 45, "nearly every token's first or second choice"


PUBLISHED = (  # docs/measurements.md, Several hosts: Gbit/s, one way in ms, step in ms, and as network_step predicts it
    (25.0, 0.1, 16.0, 16.3),
    (10.0, 0.1, 16.8, 16.1),
    (1.0, 0.1, 18.9, 23.8),
    (10.0, 0.5, 20.3, 22.2),
    (1.0, 0.5, 23.8, 30.8),
    (10.0, 5.0, 93.2, 94.4),
    (10.0, 0.1, 29.8, 29.5),
    (10.0, 5.0, 107.5, 107.2),
    (10.0, 0.1, 54.0, 52.7),
)


def test_networks_that_were_measured() -> None:
    """Nine placements on shaped networks: all but one within 10 %, where a bound that adds up both ways misses two."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 8, "num_local_experts": 4, "num_key_value_heads": 4}
    model = ModelConfig.from_dict({**MIXTRAL.raw, **shape, "num_attention_heads": 16, "intermediate_size": 256})
    cost = ModelCost.of(model, "bfloat16", WeightsHeld.all_in("bfloat16"))
    errors, before = [], []
    for gbit, latency, measured, bound in PUBLISHED:
        network = Network(latency, gbit)
        machines = fleet(ToldRates(0, 0), ToldRates(0, 0), 4, host=1, network=network)
        alone = bound - network_step(model, "bfloat16", network, 8).network_ms
        step = decode_step(cost, machines, each_its_own(4), 8, 32, micro_batches=1)
        errors.append(abs((alone + 1e3 * step.network_s) / measured - 1))
        before.append(abs(bound / measured - 1))
    assert sum(error <= 0.1 for error in errors) == 8
    assert sum(error <= 0.1 for error in before) == 7
    assert max(errors) < 0.17


def test_busy_experts_that_were_measured() -> None:
    """docs/measurements.md, Skewed load and Several trunks: experts so busy that what carries calls hardly counts."""

    def step(
        trunks: int, replicas: int, service: ToldRates, micro: int, tokens: int, layers: int, weights: list[float]
    ) -> StepTime:
        devices = [Device("trunk", 0, 2**40, ToldRates(0, 0)) for _ in range(trunks)]
        devices += [Device("expert", 0, 2**40, service) for _ in range(8 * replicas)]
        homes = tuple(tuple(trunks + expert + 8 * copy for copy in range(replicas)) for expert in range(8))
        spread, sequences = Spread(tuple(range(trunks)), homes), trunks * micro * tokens
        machines = Machines(tuple(devices))
        return decode_step(told(8, 2, layers), machines, spread, sequences, 1, weights, micro_batches=micro)

    heavy, alike = ToldRates(6000, 1500), [1.0] * 8
    hot = step(4, 1, heavy, 3, 64, 4, popularity(8, 2.3))
    assert hot.seconds == pytest.approx(2.867, rel=0.1)
    spread_out = step(4, 3, heavy, 3, 64, 4, alike)
    assert spread_out.seconds == pytest.approx(0.528, rel=0.1)
    for trunks in (4, 8):
        each = step(trunks, 1, ToldRates(6000, 50), 1, 8, 8, alike)
        assert each.tokens_per_s == pytest.approx(170, rel=0.1), "one batch a call"
