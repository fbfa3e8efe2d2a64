"""guidellm, unchanged, measures the served demo model: every request ends well, and every quantity that it reports is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import Served

OF_ITS_OWN = Path(sys.executable).parents[1] / "guidellm" / "bin" / "guidellm"
"""Where `make` puts it: it wants older versions of packages than the server is tested with."""
REPORTED = (
    *("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms"),
    *("output_tokens_per_second", "request_latency"),
)


@pytest.fixture(scope="module")
def guidellm() -> Path:
    found = OF_ITS_OWN if OF_ITS_OWN.exists() else shutil.which("guidellm")
    if found is None:
        pytest.skip("guidellm is not installed")
    return Path(found)


def measure(guidellm: Path, served: Served, model: Path, directory: Path, profile: str, path: str) -> dict[str, Any]:
    """Run it against a served model with four made-up prompts; its only benchmark."""
    report = directory / "report.json"
    command = [
        *(guidellm, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={served.url},model=demo,request_format={path},http2=false"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8"),
        *("--profile", profile, "--constraint", "kind=max_requests,count=4"),
        *("--output", f"kind=json,path={report}"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "HF_HOME": str(directory)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=directory, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    found: dict[str, Any] = benchmark
    return found


@pytest.mark.parametrize(
    ("profile", "path"),
    [("kind=synchronous", "/v1/completions"), ("kind=concurrent,streams=2", "/v1/chat/completions")],
    ids=["one after another", "two at a time"],
)
def test_it_measures_a_served_model(
    guidellm: Path, served_demo: Served, demo_model: Path, tmp_path: Path, profile: str, path: str
) -> None:
    benchmark = measure(guidellm, served_demo, demo_model, tmp_path, profile, path)
    (tmp_path / "shown").write_text(json.dumps(benchmark, indent=1))
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (4, 0, 0)
    for name in REPORTED:
        assert metrics[name]["successful"]["mean"] > 0, name
    assert metrics["output_token_count"]["successful"]["total_sum"] == 4 * 8
