"""The plan of Mixtral-8x7B in numbers that stand in its paper and on its model card, and the logic of what fits."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moe_ray.commands.balance_report import Balanced, balanced, print_balance
from moe_ray.commands.main import app
from moe_ray.commands.network_report import Distance, print_distance
from moe_ray.commands.plan_report import plan_json, print_plan
from moe_ray.commands.planned import Planned, planned
from moe_ray.config import Config, load_config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.cards import COMMON, MEMORY_GIB, PROCESS_BYTES, RESERVE, smallest_card
from moe_ray.experts.planning.footprint import ActorPlan, DraftPlan, Plan, WeightsHeld, make_plan
from moe_ray.experts.planning.network_step import Network, network_step
from moe_ray.experts.planning.placement import holdings
from moe_ray.model.formats import Grouping, StoredWeight
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_expert

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixtral-8x7b" / "config.json"
MIXTRAL_8X7B = json.loads(EXAMPLE.read_text(encoding="utf-8"))
"""mistralai/Mixtral-8x7B-v0.1, config.json"""
GB = 10**9


def mixtral(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**MIXTRAL_8X7B, **changes})


def test_mixtral_8x7b_at_16_bits() -> None:
    plan = make_plan(mixtral(), "float16")
    trunk, *experts = plan.actors
    assert [actor.name for actor in plan.actors] == ["Trunk", *(f"Expert{i}" for i in range(8))]
    assert sum(actor.parameters for actor in plan.actors) == 46_702_792_704  # what transformers counts
    assert {actor.weight_bytes for actor in experts} == {32 * 3 * 4096 * 14336 * 2}
    assert round(experts[0].weight_bytes / GB, 2) == 11.27
    assert round(trunk.weight_bytes / GB, 2) == 3.21
    assert round(plan.total_bytes / GB, 1) == 93.4
    assert plan.kv_bytes_per_token == 131_072
    assert plan.context == 32768


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 2), ("bfloat16", 1), ("float16", 1)])
def test_bytes_follow_the_dtype(dtype: str, factor: int) -> None:
    half, plan = make_plan(mixtral(), "float16"), make_plan(mixtral(), dtype)
    assert plan.total_bytes == factor * half.total_bytes
    assert plan.kv_bytes_per_token == factor * half.kv_bytes_per_token
    assert [a.parameters for a in plan.actors] == [a.parameters for a in half.actors]


def test_the_plan_is_what_transformers_allocates() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    for changes in ({}, {"tie_word_embeddings": True}, {"head_dim": 24}, {"num_local_experts": 3}):
        small = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            **changes,
        }
        model = MixtralForCausalLM(MixtralConfig(**small))
        plan = make_plan(mixtral(**small), "float32")
        assert sum(actor.parameters for actor in plan.actors) == model.num_parameters()


@pytest.mark.parametrize(("flags", "dtype"), [(set(), "float32"), ({"avx512_bf16"}, "bfloat16")])
def test_a_plan_for_cards_does_not_depend_on_the_cpu_that_plans(
    flags: set[str], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_ray.native.build.cpu_flags", lambda: frozenset(flags))
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    config = load_config({"model": {"path": str(tmp_path)}})
    here = planned(config, tmp_path, without_weights=True)
    assert here.plan.dtype == dtype
    on_cards = planned(config, tmp_path, without_weights=True, cards=True)
    assert on_cards.plan.dtype == "bfloat16"
    assert all(ok for _, ok, _ in on_cards.plan.fits(16 * 2**30))
    out = io.StringIO()
    print_plan(Console(file=out, width=80), on_cards, 16)
    assert "on cards, in bfloat16" in out.getvalue()
    asked = load_config({"model": {"path": str(tmp_path), "dtype": "float32"}})
    assert planned(asked, tmp_path, without_weights=True, cards=True).plan.dtype == "float32"


def test_what_fits_a_card() -> None:
    plan = make_plan(mixtral(), "float16")
    rows = plan.fits(16 * 2**30)
    assert all(ok for _, ok, _ in rows)
    trunk, _, tokens = rows[0]
    assert trunk.name == "Trunk"
    assert tokens == (math.floor(0.9 * 16 * 2**30) - trunk.weight_bytes) // 131_072
    assert {tokens for _, _, tokens in rows[1:]} == {0}, "experts hold no KV cache"
    assert [ok for _, ok, _ in plan.fits(11 * 2**30)] == [True] + [False] * 8


def test_a_kv_cache_in_int8() -> None:
    """A byte for each number, and a scale of four for each head; more tokens on the same card."""
    half, int8 = (make_plan(mixtral(), "float16", kv_cache_dtype=held) for held in ("auto", "int8"))
    assert (half.kv_cache_dtype, int8.kv_cache_dtype) == ("float16", "int8")
    assert int8.kv_bytes_per_token == 2 * 32 * 8 * (128 + 4)
    tokens = [plan.fits(16 * 2**30)[0][2] for plan in (half, int8)]
    assert tokens[1] / tokens[0] == pytest.approx(256 / 132, rel=1e-4)
    shown = CliRunner().invoke(app, ["plan", "--model", str(EXAMPLE), "--kv-cache-dtype", "int8"]).stdout
    assert "KV cache in int8: 67,584 B a token" in shown
    assert make_plan(mixtral(), "float16", kv_cache_dtype="fp8").kv_bytes_per_token == 2 * 32 * 8 * 128
    refused = CliRunner().invoke(app, ["plan", "--model", str(EXAMPLE), "--kv-cache-dtype", "int4"])
    assert "`engine.kv_cache_dtype`: Input should be 'auto', 'int8' or 'fp8', got 'int4'" in str(refused.exception)


def test_a_draft_model_is_in_the_trunk() -> None:
    dense = json.loads((EXAMPLE).read_text()) | {"num_local_experts": 1, "num_experts_per_tok": 1}
    draft = DraftPlan.of(ModelConfig.from_dict(dense), "float16")
    assert draft.parameters == 7_241_732_096, "Mistral-7B"
    assert draft.weight_bytes == 2 * draft.parameters
    assert DraftPlan.of(ModelConfig.from_dict(dense), "float16", "int8").weight_bytes < 0.6 * draft.weight_bytes
    plain, plan = make_plan(mixtral(), "float16"), make_plan(mixtral(), "float16", draft=draft)
    assert plan.total_bytes == plain.total_bytes, "the model's"
    assert plan.kv_bytes_per_token == 2 * plain.kv_bytes_per_token
    more = draft.weight_bytes + 2048 * draft.kv_bytes_per_token
    assert plan.need_bytes(plan.actors[0]) == plain.need_bytes(plain.actors[0]) + more
    assert plan.need_bytes(plan.actors[1]) == plain.need_bytes(plain.actors[1])
    assert plan.whole_need_bytes == plain.whole_need_bytes + more
    (_, fits, _), *experts = plan.fits(16 * 2**30)
    assert not fits, "3.2 and 14.5 GB"
    assert all(ok for _, ok, _ in experts)


def test_the_plan_reads_no_more_than_the_draft_models_config(tmp_path: Path) -> None:
    dense = {key: value for key, value in MIXTRAL_8X7B.items() if "expert" not in key and "router" not in key}
    settings = {"model_type": "llama", "num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 512}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dense | settings | {"num_hidden_layers": 2, "num_attention_heads": 4}))
    command = ["plan", "--model", str(EXAMPLE), "--draft-model", str(path)]
    shown = CliRunner().invoke(app, command).stdout
    assert re.search(r"draft model, in each trunk: [\d.]+ M parameters, [\d.]+ MiB", shown)
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["draft_model"]
    assert told["kv_bytes_per_token"] == 2 * 2 * 4 * 64 * 2
    path.write_text(json.dumps(dense | settings | {"vocab_size": 99}))
    refused = CliRunner().invoke(app, command)
    assert "a vocabulary of 99 tokens, the model one of 32000" in str(refused.exception)


def test_fits_at_the_very_edge() -> None:
    plan = Plan(
        "float16",
        (ActorPlan("Trunk", 50, 100, kv_bytes_per_token=10), ActorPlan("Expert0", 60, 120)),
        10,
        64,
        "float16",
    )
    assert [row[1:] for row in plan.fits(120, reserve=0)] == [(True, 2), (True, 0)]
    assert [row[1:] for row in plan.fits(119, reserve=0)] == [(True, 1), (False, 0)]
    assert [row[1:] for row in plan.fits(109, reserve=0)] == [(False, 0), (False, 0)], (
        "a trunk without KV serves nobody"
    )
    assert [row[1:] for row in plan.fits(99, reserve=0)] == [(False, 0), (False, 0)]
    assert [row[1:] for row in plan.fits(240, reserve=0.5)] == [(True, 2), (True, 0)]


def test_groups_and_spares_are_planned_by_name() -> None:
    model = mixtral()
    key = 3 * 4096 * 14336 * 2
    spares = [{(8, 3), (9, 3)}, {(layer, 5) for layer in range(32)}]
    plan = make_plan(model, "float16", holdings(32, 8, 3, spares))
    assert [(actor.name, actor.weight_bytes) for actor in plan.actors[1:]] == [
        *(("Experts0-2", 96 * key), ("Experts3-5", 96 * key), ("Experts6-7", 64 * key)),
        *(("Spare0", 2 * key), ("Spare1", 32 * key)),
    ]
    plain = make_plan(model, "float16")
    assert (plan.total_bytes, plan.total_parameters) == (plain.total_bytes, plain.total_parameters)
    assert [tokens for _, _, tokens in plan.fits(80 * 2**30)][1:] == [0] * 5


WANDERING = [[70, 10, 10, 10], [10, 70, 10, 10], [10, 10, 70, 10], [10, 10, 10, 70]]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_local_experts": 4}
    changes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL_8X7B, **changes}))
    (tmp_path / "load.json").write_text(json.dumps({"rows": WANDERING}))
    (tmp_path / "hot.json").write_text(json.dumps({"rows": [[50, 20, 20, 10]] * 4}))
    return tmp_path


def said_and_read(made: Planned, advice: Balanced, file: Path) -> Config:
    """The configuration that comes of pasting what is printed; the same as that of the JSON."""
    out = io.StringIO()
    print_balance(Console(file=out, width=80, highlight=False), made, advice)
    file.write_text(out.getvalue().split("in the configuration file\n")[1])
    read = load_config(None, file)
    in_json = json.loads(plan_json(made, None, advice))["balance"]["config"]
    assert load_config(in_json) == read
    assert read != load_config()
    return read


@pytest.mark.parametrize("per_actor", [1, 2])
def test_proposed_spares_are_a_configuration(small: Path, per_actor: int) -> None:
    config = load_config({"model": {"path": str(small)}, "experts": {"experts_per_actor": per_actor}})
    made = planned(config, small, without_weights=True)
    advice = balanced(made, small / "load.json", 2, 3)
    read = said_and_read(made, advice, small / "proposal.yaml")
    assert read.experts.spare_keys(4, 4) == tuple(keys for keys in advice.proposal.extras if keys)
    with_spares = planned(read, small, without_weights=True)
    extra = with_spares.plan.actors[5:]
    assert [actor.name for actor in extra] == [f"Spare{i}" for i in range(len(extra))]
    assert [actor.weight_bytes for actor in extra] == [
        entry["weight_bytes"] for entry in json.loads(plan_json(made, None, advice))["balance"]["extras"]
    ]


def test_proposed_spares_of_quantised_experts_have_their_bytes(small: Path) -> None:
    config = load_config({"model": {"path": str(small)}, "experts": {"quantize": "int4"}})
    made = planned(config, small, without_weights=True)
    advice = balanced(made, small / "load.json", 2, 3)
    extras = json.loads(plan_json(made, None, advice))["balance"]["extras"]
    key = made.plan.actors[1].weight_bytes // 4
    assert [extra["weight_bytes"] for extra in extras] == [
        key * sum(map(len, extra["layers"].values())) for extra in extras
    ]


def test_proposed_replicas_are_a_configuration(small: Path) -> None:
    config = load_config({"model": {"path": str(small)}})
    made = planned(config, small, without_weights=True)
    advice = balanced(made, small / "hot.json", 3, None)
    read = said_and_read(made, advice, small / "proposal.yaml").experts
    assert [read.of(e).num_replicas for e in range(4)] == [advice.proposal.replicas((0, e)) for e in range(4)]
    assert sum(read.of(e).num_replicas for e in range(4)) == 4 + 3


def test_proposed_replicas_of_experts_that_share_an_actor_are_spares(small: Path) -> None:
    config = load_config({"model": {"path": str(small)}, "experts": {"experts_per_actor": 2}})
    made = planned(config, small, without_weights=True)
    advice = balanced(made, small / "hot.json", 2, None)
    read = said_and_read(made, advice, small / "proposal.yaml").experts
    assert read.spare_keys(4, 4) == advice.proposal.extras
    assert all(spare.experts in ({0: "all"}, {1: "all"}, {2: "all"}) for spare in read.spares)


def test_where_nothing_is_proposed_there_is_nothing_to_paste(small: Path) -> None:
    made = planned(load_config({"model": {"path": str(small)}}), small, without_weights=True)
    advice = balanced(made, small / "load.json", 0, None)
    assert json.loads(plan_json(made, None, advice))["balance"]["config"] == {}
    out = io.StringIO()
    print_balance(Console(file=out, width=80), made, advice)
    assert "configuration file" not in out.getvalue()


def test_experts_inside_the_trunk_are_planned_one_by_one(small: Path) -> None:
    experts = {"experts_per_actor": 2, "spares": [{"experts": {0: "all"}}]}
    config = load_config({"model": {"path": str(small)}, "transport": "local", "experts": experts})
    names = [actor.name for actor in planned(config, small, without_weights=True).plan.actors]
    assert names == ["Trunk", "Expert0", "Expert1", "Expert2", "Expert3"]


def test_a_wrong_spare_is_told_before_anything_is_started(small: Path) -> None:
    config = load_config({"model": {"path": str(small)}, "experts": {"spares": [{"experts": {1: "2-4"}}]}})
    with pytest.raises(ConfigError, match=r"`experts.spares.0.experts.1`: no layer 4: this model has 0 to 3"):
        planned(config, small, without_weights=True)


def test_what_a_network_adds_to_a_step_of_mixtral() -> None:
    """Worked out by hand: 32 layers, two copies of a row of 8,192 bytes each way, 96 bytes of headers a call."""
    step = network_step(mixtral(), "float16", Network(0.1, 10.0), 1)
    assert step.bytes_out == 32 * (2 * (8192 + 4) + 2 * 96)
    assert step.bytes_in == 32 * (2 * 8192 + 2 * 96)
    assert step.latency_ms == pytest.approx(32 * 0.2)
    assert step.transfer_ms == pytest.approx(1e3 * 8 * (step.bytes_out + step.bytes_in) / 10e9)
    assert step.network_ms == pytest.approx(7.25, abs=0.01)
    assert step.tokens_per_s() == pytest.approx(1e3 / step.network_ms)
    assert step.step_ms(12.75) == pytest.approx(20.0, abs=0.01)
    assert step.tokens_per_s(12.75) == pytest.approx(50.0, abs=0.1)


def test_streams_share_latency_but_not_bandwidth() -> None:
    one, many = (network_step(mixtral(), "float16", Network(0.5, 10.0), tokens) for tokens in (1, 64))
    assert many.latency_ms == one.latency_ms
    assert many.transfer_ms == pytest.approx(64 * one.transfer_ms, rel=0.03), "headers are the same for more rows"
    assert many.tokens_per_s() > 10 * one.tokens_per_s()


def test_what_bounds_nothing_takes_no_time() -> None:
    free = network_step(mixtral(), "float16", Network(), 8)
    assert (free.network_ms, free.tokens_per_s(), free.tokens_per_s(10.0)) == (0.0, math.inf, 800.0)
    latency = network_step(mixtral(), "float16", Network(latency_ms=1.0), 8)
    assert (latency.latency_ms, latency.transfer_ms) == (64.0, 0.0)
    bandwidth = network_step(mixtral(), "float16", Network(gbit=1.0), 8)
    assert (bandwidth.latency_ms, bandwidth.network_ms) == (0.0, bandwidth.transfer_ms)


def test_experts_on_the_trunks_host_cost_no_bandwidth() -> None:
    whole, half = (network_step(mixtral(), "float16", Network(0.1, 10.0), 8, remote) for remote in (1.0, 0.5))
    assert half.transfer_ms == pytest.approx(whole.transfer_ms / 2)
    assert half.latency_ms == whole.latency_ms, "a layer waits for its farthest expert"


def test_a_row_is_as_wide_as_its_dtype() -> None:
    half, full = (network_step(mixtral(), dtype, Network(gbit=1.0), 8) for dtype in ("bfloat16", "float32"))
    assert full.bytes_in == pytest.approx(2 * half.bytes_in, rel=0.02)


def test_the_network_is_printed_and_in_the_json(small: Path) -> None:
    made = planned(load_config({"model": {"path": str(small)}}), small, without_weights=True)
    distance = Distance(Network(0.5, 1.0), (1, 8), compute_ms=6.0)
    found = json.loads(plan_json(made, None, None, distance))["network"]
    assert (found["latency_ms"], found["gbit"], found["compute_ms"]) == (0.5, 1.0, 6.0)
    assert [row["streams"] for row in found["rows"]] == [1, 8]
    assert found["rows"][0]["tokens_per_s"] == pytest.approx(1e3 / (6.0 + found["rows"][0]["network_ms"]))
    out = io.StringIO()
    print_distance(Console(file=out, width=80, highlight=False), made, distance)
    assert "0.5 ms one way, 1 Gbit/s at the trunk; 4 round trips a step" in out.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    free = Distance(Network(), (1,))
    assert json.loads(plan_json(made, None, None, free))["network"]["rows"][0]["tokens_per_s_bound"] == 0.0, (
        "JSON has no inf"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--streams", "4"), "go with --bandwidth or --latency"),
        (("--step-ms", "9"), "go with --bandwidth or --latency"),
        (("--bandwidth", "0"), "--bandwidth: must be above 0, got 0"),
        (("--latency", "1", "--streams", "0"), "--streams: expected numbers from 1"),
    ],
)
def test_wrong_networks_are_refused(small: Path, flags: tuple[str, ...], said: str) -> None:
    from typer.testing import CliRunner

    from moe_ray.commands.main import app

    error = CliRunner().invoke(app, ["plan", "--model", str(small), *flags]).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)


@pytest.mark.parametrize(
    ("flags", "over", "below", "expert", "card", "alone"),
    [  # the article that this project starts from: over 90 GB at 16 bits, over 45 at 8, over 23 at 4
        ([], 90, 94, 2.0, 16, 141),
        (["--quantize", "int8", "--quantize-trunk", "int8"], 45, 47, 1 + 2 / 128, 8, 80),
        (["--quantize", "int4", "--quantize-trunk", "int4"], 23, 24, 0.5 + 2 / 32, 4, 32),
        (["--quantize", "nf4", "--quantize-trunk", "nf4"], 23, 24, 0.5 + 2 / 64, 4, 32),
    ],
)
def test_mixtral_8x7b_in_the_precisions_of_the_article(
    flags: list[str], over: float, below: float, expert: float, card: int, alone: int
) -> None:
    command = ["plan", "--model", str(EXAMPLE), "--dtype", "float16", *flags]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    codes = (made["total_weight_bytes"] - made["total_scale_bytes"]) / GB
    assert over < codes < below
    assert sum(row["weight_bytes"] for row in made["rows"]) == made["total_weight_bytes"]
    for row in made["rows"][1:]:
        assert row["weight_bytes"] == 32 * 3 * 4096 * 14336 * expert
        assert row["smallest_card"]["gib"] == card
    assert made["smallest_card_for_all"]["gib"] == alone
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "100"}).stdout
    assert re.search(rf"Expert7 .* {card} GiB \(", shown)
    assert f"on one card: {alone} GiB" in shown


def test_what_the_trunk_of_mixtral_8x7b_keeps_as_floats() -> None:
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2
    floats = 32000 * 4096 + 32 * (2 * 4096 + 8 * 4096) + 4096
    held = WeightsHeld(HeldAs("float16", "int8"), {3: HeldAs("float16", "int4")})
    trunk, *experts = make_plan(mixtral(), "float16", held=held).actors
    assert trunk.weight_bytes == 2 * floats + (32 * layer + 32000 * 4096) * (1 + 2 / 128)
    assert [actor.held_as for actor in experts] == [("float16",)] * 3 + [("int4",)] + [("float16",)] * 4
    assert experts[3].weight_bytes / experts[0].weight_bytes == (0.5 + 2 / 32) / 2


def test_formats_of_one_expert_and_of_spares_are_planned(small: Path) -> None:
    (small / "config.yaml").write_text(
        "experts:\n"
        "  quantize: int4\n"
        "  overrides: {3: {quantize: int8}, 1: {quantize: null}}\n"
        '  spares: [{experts: {3: "0"}, quantize: int8}, {experts: {0: "1-2"}}]\n'
    )
    config = load_config({"model": {"path": str(small), "dtype": "bfloat16"}}, small / "config.yaml")
    made = planned(config, small, without_weights=True).plan
    key = 3 * 64 * 96
    eighths = [4 * key * bits for bits in (4 + 16 / 32, 16, 4 + 16 / 32)]
    assert [actor.weight_bytes * 8 for actor in made.actors[1:4]] == eighths
    # 64 inputs are a group of 64, 96 are three of 32
    int8 = 2 * (96 * 64 + 96 * 2) + (64 * 96 + 64 * 2 * 3)
    assert made.actors[4].weight_bytes == 4 * int8
    assert [actor.weight_bytes for actor in made.actors[5:]] == [int8, 2 * made.actors[1].weight_bytes // 4]
    assert [actor.held_as for actor in made.actors[4:]] == [("int8",), ("int8",), ("int4",)]


def test_a_quantisation_that_does_not_exist_is_refused() -> None:
    result = CliRunner().invoke(app, ["plan", "--model", str(EXAMPLE), "--quantize", "int3"])
    assert isinstance(result.exception, ConfigError)
    assert "`experts.quantize`: Input should be 'int8', 'int4' or 'nf4', got 'int3'" in str(result.exception)


def test_what_comes_quantised_is_planned_in_its_own_bits() -> None:
    model = mixtral()
    how = Grouping(bits=4, group=128, offsets=True)
    stored = {
        weight: StoredWeight("gptq", weight.shape, (), how)
        for layer in range(32)
        for weight in weights_of_expert(model, layer, 0)
    }
    held = WeightsHeld(HeldAs("float16"), {0: HeldAs("float16", "int8")}, stored)
    _, first, second, *_ = make_plan(model, "float16", held=held).actors
    assert (first.held_as, second.held_as) == (("gptq",), ("float16",))
    assert first.weight_bytes == first.parameters * (0.5 + 4 / 128)
    assert first.scale_bytes == first.parameters * 4 / 128


def test_a_quantised_config_without_its_weights_is_planned_aloud(tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL_8X7B, "quantization_config": said}))
    command = ["plan", "--model", str(tmp_path / "config.json"), "--dtype", "float16", "--quantize", "int4"]
    assert "its weights are quantised with gptq; they are not here" in CliRunner().invoke(app, command).stdout
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["unseen_quantization"] == "gptq"
    plain = CliRunner().invoke(app, ["plan", "--model", str(EXAMPLE), "--json"])
    assert json.loads(plain.stdout)["unseen_quantization"] is None


def test_the_smallest_card_has_room_for_the_process_and_a_reserve() -> None:
    sizes = [gib for gib, _ in COMMON]
    assert sizes == sorted(set(sizes))
    edge = int(16 * 2**30 * (1 - RESERVE)) - PROCESS_BYTES
    assert [found[0] for need in (edge, edge + 1) if (found := smallest_card(need))] == [16, 24]
    assert smallest_card(10**12) is None


def test_common_cards_have_the_memory_that_ray_knows_them_by() -> None:
    for gib, names in COMMON:
        for name in names.split(", "):
            assert MEMORY_GIB.get(name, gib) == gib, name
