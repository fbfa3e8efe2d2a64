"""guidellm, unchanged, measures the served demo model: every request ends well, every quantity is reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_it_measures_one_stream_and_two(guidellm: Path, served_demo: Served, demo_model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        *(guidellm, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={served_demo.url},model=demo,request_format=/v1/chat/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={demo_model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8"),
        *("--profile", "{kind: concurrent, streams: [1, 2]}", "--constraint", "kind=max_requests,count=3"),
        *("--output", f"kind=json,path={report}"),
    ]
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert [benchmark["config"]["strategy"]["streams"] for benchmark in benchmarks] == [1, 2]
    for benchmark in benchmarks:
        metrics = benchmark["metrics"]
        totals = metrics["request_totals"]
        assert (totals["errored"], totals["incomplete"]) == (0, 0)
        # It may end before it has read the last of its own notes: seen once on a busy machine.
        assert totals["successful"] in (2, 3)
        for name in REPORTED:
            assert metrics[name]["successful"]["mean"] > 0, name
        assert metrics["output_token_count"]["successful"]["total_sum"] == 8 * totals["successful"]
