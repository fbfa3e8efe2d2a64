"""The command line is assembled from one file a verb, and parsing loads none of what the verbs run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_ray import commands
from moe_ray.commands.main import BENCHES, CONVERSIONS, VERBS

LOADS_NOTHING = """
import sys
from moe_ray.commands.main import app
try:
    app({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
loaded = sorted(name for name in sys.modules if name.startswith("moe_ray.bench") or name in ("ray", "torch", "grpc"))
assert not loaded, loaded
"""


@pytest.mark.parametrize("words", ["--help", "serve --help", "bench --help", "bench chaos --help", "version"])
def test_parsing_loads_no_bench(words: str) -> None:
    code = LOADS_NOTHING.format(arguments=words.split())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_its_file() -> None:
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert {verb.__name__ for verb in VERBS} <= files
    assert {verb.__module__.rsplit(".", 1)[1] for verb in VERBS} == {verb.__name__ for verb in VERBS}
    assert {verb.__module__ for verb in CONVERSIONS} == {"moe_ray.commands.convert"}
    benches = {"moe_ray.commands.bench", "moe_ray.commands.bench_gpu", "moe_ray.commands.bench_lab"}
    assert {verb.__module__ for verb in BENCHES} == benches
