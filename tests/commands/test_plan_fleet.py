"""`moe-ray plan --fleet`: machines as they are described, and what is said of models on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published_configs import CONFIGS
from typer.testing import CliRunner

from moe_ray.commands.fleet_file import read_fleet
from moe_ray.commands.main import app
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.network_step import Network
from moe_ray.experts.planning.rates import DataSheet

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixtral-8x7b" / "config.json"
FILE = """
network: {gbit: 25, latency_us: 50}
machines:
  - {card: T4, count: 4, per_host: 2, price_per_hour: 0.35}
  - {cpu_cores: 16, count: 2, memory_gib: 128, read_gb_s: 90}
  - {card: Homemade, memory_gib: 30, read_gb_s: 500, tflops: {float16: 50}}
"""


def told(*arguments: str) -> dict[str, Any]:
    """The fleet part of a plan's JSON."""
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert done.exception is None, done.exception
    found: dict[str, Any] = json.loads(done.stdout)["fleet"]
    return found


def refused(*arguments: str) -> str:
    return str(CliRunner().invoke(app, ["plan", "--model", str(EXAMPLE), *arguments]).exception)


def test_a_list_of_machines() -> None:
    machines = read_fleet("8x T4-16GB, 1x L4@0.80, 2x cpu:16")
    names = [device.name for device in machines.devices]
    assert names == ["T4-16GB"] * 8 + ["L4-24GB"] + ["cpu:16"] * 2
    assert [device.host for device in machines.devices] == list(range(11))
    assert [device.price_per_hour for device in machines.devices] == [None] * 8 + [0.8, None, None]
    assert [device.has_bfloat16 for device in machines.devices] == [False] * 8 + [True] * 3
    assert machines.devices[0].memory_bytes == 16 * 2**30


def test_a_file_of_machines(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(FILE)
    machines = read_fleet(str(path))
    assert machines.network == Network(0.05, 25)
    assert [device.host for device in machines.devices] == [0, 0, 1, 1, 2, 3, 4]
    cpu, own = machines.devices[4], machines.devices[-1]
    assert isinstance(cpu.rates, DataSheet)
    assert (cpu.memory_bytes, cpu.rates.read_gb_s, cpu.rates.lanes) == (128 * 2**30, 90, 16)
    assert (own.name, own.has_bfloat16) == ("Homemade", False)
    assert read_fleet(str(path), Network(1.0)).network == Network(1.0), "flags win"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("T5", "no card is known as 'T5'; known cards: P100-16GB"),
        ("A100", "'A100' may be A100-40GB or A100-80GB"),
        ("0x T4", "1 to 256 of a kind"),
        ("cpu", "a CPU host is cpu:CORES"),
        ("8 * T4", "expected a file, `here`, or a list"),
        ("200x T4, 100x L4", "at most 256"),
        ("absent.yaml", "cannot be read"),
    ],
)
def test_machines_that_are_not_understood(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_fleet(text)
    assert why in str(caught.value)
    assert "--fleet" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("machines: []", "`machines`"),
        ("machines: [{card: T4, cpu_cores: 2}]", "machines.0: name either a `card` or `cpu_cores`"),
        ("machines: [{card: T4, colour: red}]", "unknown configuration key `machines.0.colour`"),
        ("machines: [{card: T4, count: 0}]", "`machines.0.count`"),
        ("machines: [{card: Z9}]", "with memory_gib, read_gb_s and tflops"),
        ("machines: [{card: T4, tflops: {fp4: 1}}]", "allowed: bfloat16, float16, float32, int8"),
        ("- T4", "expected `machines:` with a list"),
        ("{", "no YAML"),
    ],
)
def test_files_that_are_not_understood(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_fleet(str(path))
    assert why in str(caught.value)


def test_advice_on_the_command_line() -> None:
    command = ["plan", "--model", str(EXAMPLE), "--fleet", "1x H100-80GB", "--formats", "int4", "--streams", "1,8"]
    done = CliRunner().invoke(app, command)
    assert done.exception is None, done.exception
    assert "Do not pull this model apart here: one H100-80GB holds it in int4, with " in done.stdout


def test_all_numbers_are_in_the_json() -> None:
    fleet = told("--model", str(EXAMPLE), "--fleet", "9x L4@0.5", "--formats", "float", "--bandwidth", "10")
    best = fleet["placements"][0]
    assert (best["in_process"], best["format"]) == (False, "bfloat16")
    step = best["steps"][-1]
    assert step["sequences"] == 32
    assert step["tokens_per_s"] == pytest.approx(32e3 / step["step_ms"])
    price = best["price_per_hour"] / 3600 / step["tokens_per_s"] * 1e6
    assert step["price_per_million_tokens"] == pytest.approx(price)
    assert best["most_sequences"] == best["kv_tokens"] // fleet["context"]
    assert any("no single device here holds it" in sentence for sentence in fleet["advice"])


def test_a_model_of_many_experts_has_them_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["OLMoE-1B-7B-0924"]))
    fleet = told("--model", str(path), "--fleet", "3x RTX3060", "--formats", "float", "--streams", "4")
    best = fleet["placements"][0]
    assert best["experts_per_actor"] == 4, "64 experts in 16 actors; 13.8 GB do not fit a card of 12 GB"
    homes = [device for devices in best["expert_devices"] for device in devices]
    assert all(len(set(homes[first : first + 4])) == 1 for first in range(0, 64, 4))


def test_recorded_load_is_used(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"rows": [[10, 10, 10, 40, 10, 10, 10, 10]] * 32}))
    model = ["--model", str(EXAMPLE), "--fleet", "9x L4", "--formats", "float", "--streams", "8"]
    even, hot = told(*model), told(*model, "--load", str(path))
    assert any(sentence.startswith("Expert 3 has 2.9x the mean load") for sentence in hot["advice"])
    rates = [found["placements"][0]["steps"][0]["tokens_per_s"] for found in (even, hot)]
    assert rates[1] < rates[0], "the others wait for the device of the hot expert"


def test_flags_that_do_not_go_together() -> None:
    assert "go with --fleet" in refused("--objective", "cost")
    assert "--probe-again goes with --fleet here" in refused("--fleet", "H200", "--probe-again")
    assert "is none of tokens, latency, cost" in refused("--fleet", "H200", "--objective", "speed")
    assert "is none of float, int8, int4, nf4" in refused("--fleet", "H200", "--formats", "fp3")
    assert "--context: this model's is at most 32768" in refused("--fleet", "H200", "--context", "100000")
    assert "--step-ms does not go with --fleet" in refused("--fleet", "H200", "--step-ms", "3")
    assert "leave the variants out" in refused("--fleet", "H200", "--variant", f"tuned={EXAMPLE.parent}")
    assert "leave experts.cpu_offload_gib out" in refused("--fleet", "H200", "--cpu-offload-gib", "8")
    assert "every machine needs a price" in refused("--fleet", "H200", "--objective", "cost")
    said = refused("--fleet", "L4", "--formats", "float")
    assert "bfloat16 needs 93.4 GB of weights" in said
    assert said.endswith("it would fit in no other format")
    assert refused("--fleet", "2x L4", "--formats", "float").endswith("it would fit in int4, nf4")
