"""Kernels that are compiled before a process starts are those that it launches: JIT finds all of them in its cache.

There is no card here. The process that launches has a driver that says which card there is, and loads and runs nothing;
all before that is Triton's own, on real tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "bfloat16": {},
    "int8 experts, int8 cache": {"quantize": "int8", "cache": "int8"},
    "nf4 experts, int4 trunk, float8 cache": {"quantize": "nf4", "trunk_quantize": "int4", "cache": "fp8"},
    "gpt-oss": {"family": "gpt_oss", "quantize": "int4"},
    "qwen2_moe": {"family": "qwen2_moe", "dtype": "float16"},
}


def told(script: str, cache: Path, *arguments: object) -> list[dict[str, int]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(cache)}
    code = f"import ahead_of_start\nahead_of_start.{script}(*{[*arguments]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_when_kernels_are_launched(case: str, tmp_path: Path) -> None:
    (made,) = told("compile_all", tmp_path, CASES[case], 90)
    assert made["made"] > 10
    assert made["found"] == 0
    (launched,) = told("launch_all", tmp_path, CASES[case], 90)
    assert launched["launches"] > 200
    assert launched["found"] > 10
    assert launched["made"] == 0
    assert not list(tmp_path.glob("*/*.ptx")), "a card's process reads none of it"


@pytest.mark.slow
def test_kernels_of_another_card_are_not_found(tmp_path: Path) -> None:
    told("compile_all", tmp_path, {}, 90)
    (launched,) = told("launch_all", tmp_path, {}, 86)
    assert launched["found"] == 0
    assert launched["made"] > 10
