"""`bench engine` compares like with like: the same tokens from experts in one process and in their own."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from moe_ray.bench.engine_process import random_prompts
from moe_ray.bench.offline import EngineBenchOptions, run_engine
from moe_ray.errors import CheckpointError, ConfigError


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def processes() -> list[str]:
    """Command lines of what the bench started and has not ended."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # of other tests, ended in this moment
            lines.append(" ".join(process.cmdline()))
    return [line for line in lines if "moe_ray.bench." in line]


@pytest.mark.slow
def test_spread_engines_give_the_same_tokens(random_model: Path) -> None:
    loading: dict[str, tuple[int, int]] = {}

    def note(what: str, done: int, total: int) -> None:
        loading[what] = (done, total)

    options = EngineBenchOptions(
        model=str(random_model),
        carriers=("local", "socket", "grpc"),
        concurrency=(1, 2),
        prompt_tokens=20,
        output_tokens=12,
        repeats=2,
        micro_batches=2,
    )
    report = run_engine(options, note)
    assert processes() == []
    assert [(row["carrier"], row["concurrency"]) for row in report.rows] == [
        (carrier, count) for carrier in ("local", "socket", "grpc") for count in (1, 2)
    ]
    for row in report.rows:
        assert row["same_tokens"] == 1.0
        low, middle, high = (float(row[f"efficiency{end}"] or 0) for end in ("_min", "", "_max"))
        assert 0 < low <= middle <= high
        assert (middle == 1.0) or row["carrier"] != "local"
        for key in ("output_tokens_per_s", "local_tokens_per_s", "ttft_p50_ms", "decode_tokens_per_s"):
            assert float(row[key] or 0) > 0
    assert report.facts["dtype"] == "float32"
    assert report.facts["repeats"] == 2
    assert report.facts["micro_batches"] == 2
    assert all(float(str(report.facts[f"pss_gib_{carrier}"])) > 0 for carrier in options.carriers)
    whole = [f"Expert{e}" for e in range(8)] + [f"{carrier} Trunk" for carrier in options.carriers] + ["waves"]
    assert all(loading[what][0] == loading[what][1] > 0 for what in whole)


@pytest.mark.slow
def test_the_ray_carrier(random_model: Path) -> None:
    options = EngineBenchOptions(
        model=str(random_model), carriers=("ray",), concurrency=(2,), prompt_tokens=8, output_tokens=4, repeats=1
    )
    report = run_engine(options, silent)
    assert [(row["carrier"], row["same_tokens"]) for row in report.rows] == [("local", 1.0), ("ray", 1.0)]
    assert processes() == []


@pytest.mark.slow
def test_no_further_repeat_once_the_time_is_spent(random_model: Path) -> None:
    options = EngineBenchOptions(
        model=str(random_model), carriers=("local",), concurrency=(1,), output_tokens=2, repeats=5, budget_s=0
    )
    assert run_engine(options, silent).facts["repeats"] == 1


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run_engine(EngineBenchOptions(model=str(tmp_path / "nothing")), silent)
    assert processes() == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (EngineBenchOptions(carriers=("auto",)), "--carriers: auto; allowed: local, socket, grpc, ray"),
        (EngineBenchOptions(concurrency=(0,)), "--concurrency"),
        (EngineBenchOptions(output_tokens=1), "--output-tokens"),
        (EngineBenchOptions(micro_batches=-1), "--micro-batches"),
    ],
)
def test_wrong_options_are_named(options: EngineBenchOptions, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_engine(options, silent)


def test_prompts_differ_between_seeds() -> None:
    first, second = (random_prompts(4, 16, 512, seed) for seed in (1, 2))
    assert first == random_prompts(4, 16, 512, 1)
    assert len({tuple(prompt[:4]) for prompt in first + second}) == 8
    assert all(3 <= token < 512 for prompt in first for token in prompt)
