"""`moe-ray bench gpu`: its options, and the whole script in Triton's interpreter: all that a card is not needed for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ray.bench.gpu import run_gpu
from moe_ray.bench.gpu_options import GpuBenchOptions
from moe_ray.bench.gpu_shapes import SHAPES, WEIGHTS, shape_config
from moe_ray.errors import ConfigError
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import weights_of_model

BIN = Path(sys.executable).parent


def nothing(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"parts": ("kernels", "speed")}, "--parts: kernels, speed; allowed: kernels, engine"),
        ({"carriers": ()}, "--carriers: none; allowed: local, socket, grpc"),
        ({"weights": ("int5",)}, "--weights: int5; allowed: bfloat16, float16, int8, int4"),
        ({"concurrency": (0,)}, "--concurrency: must be numbers of at least 1"),
        ({"output_tokens": 1}, "--output-tokens: must be at least 2"),
        ({"shape": "gpt-5"}, "--shape: 'gpt-5'; allowed: mixtral-8x7b, mixtral-8x22b, tiny"),
    ],
)
def test_wrong_options_name_themselves(wrong: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        run_gpu(GpuBenchOptions(cache_dir=tmp_path, **wrong), nothing)  # type: ignore[arg-type]


def test_shapes_are_those_that_were_published() -> None:
    parameters = {
        shape: sum(weight.numel for weight in weights_of_model(ModelConfig.from_dict(shape_config(shape, "bfloat16"))))
        for shape in SHAPES
    }
    assert parameters["mixtral-8x7b"] == 46_702_792_704
    assert parameters["mixtral-8x22b"] == 140_630_071_296
    for weights in WEIGHTS:
        config = ModelConfig.from_dict(shape_config("mixtral-8x7b", weights, num_layers=3))
        assert config.num_hidden_layers == 3
        assert (config.quantization is None) == weights.endswith("float16")


@pytest.mark.slow
def test_the_dry_run_walks_the_whole_script(tmp_path: Path) -> None:
    command = ["bench", "gpu", "--cpu-dry-run", "--weights", "int4", "--long-prompt", "32768", "--json"]
    done = subprocess.run(
        [BIN / "moe-ray", *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "MOE_RAY_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["dry_run"].startswith("in an interpreter")
    table = report["One expert's layer"]
    assert {row["by"].split()[0] for row in table} == {"triton", "torch"}
    assert len({tuple(row) for row in table}) == 1
    assert report["left_out"].startswith("gemlite")
    sides = [(row["side"], row["concurrency"]) for row in report["rows"]]
    assert sides == [("one process", 1), ("one process", 2), ("9 processes, socket", 1), ("9 processes, socket", 2)]
    assert all(row["same_tokens"] == 1 for row in report["rows"]), "pulled apart, not a token changes"
    assert all(row["exchange_p50_us"] > 0 and row["output_tokens_per_s"] > 0 for row in report["rows"])
    assert [row["prompt_tokens"] for row in report["A long prompt"]] == [40]


@pytest.mark.slow
def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run(
        [BIN / "moe-ray", "bench", "gpu", "--shape", "tiny", "--weights", "int4"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MOE_RAY_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "sees no CUDA device" in done.stderr
