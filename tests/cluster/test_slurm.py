"""The Slurm script: clean for shellcheck, and run against stand-ins for Slurm's and Ray's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_files import BIN, CLUSTER, clean_environment, shell

SCRIPT = CLUSTER / "slurm" / "moe-ray.sbatch"
SHELL_FILES = sorted([*CLUSTER.rglob("*.sh"), SCRIPT])


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    checked = shell(BIN / "shellcheck", "-x", "-P", "SCRIPTDIR", path)
    assert (checked.returncode, checked.stdout) == (0, "")
    if path.name != "common.sh":
        assert "set -euo pipefail" in path.read_text()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on three nodes, whose commands write what they were asked to $LOG."""
    tools = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        # srun OPTIONS… COMMAND…: runs the command here.
        "srun": """while (($#)); do case $1 in
            -w) node=$2; shift 2;; -*) shift;; *) break;; esac; done
            echo "$node: $*" >>"$LOG"; exec env NODE="$node" "$@" """,
        "hostname": "echo 10.0.0.1",
        "ray": """case $1 in
            start) trap 'echo "$NODE: ended" >>"$LOG"; exit 0' TERM; while :; do sleep 0.1; done;;
            esac""",
        "serve": 'echo "$NODE: serve $*" >>"$LOG"; test -s "$RAY_AUTH_TOKEN_PATH"',
        "curl": 'echo \'{"data": [{"id": "m"}]}\'',
        "python3": f"""case "$*" in *ray.init*) echo 3;; *) exec {sys.executable} "$@";; esac""",
    }
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, text in tools.items():
        tool = tmp_path / "venv" / "bin" / name
        tool.write_text(f"#!/bin/bash\n{text}\n")
        tool.chmod(0o755)
    return clean_environment(tmp_path) | {
        "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "MOE_RAY_VENV": str(tmp_path / "venv"),
        "MOE_RAY_HOME": str(CLUSTER),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_PER_NODE": "2",
    }


def test_a_job_starts_deploys_and_cleans_up(slurm: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen([SCRIPT], env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert job.stdout is not None
        said = ""
        for line in job.stdout:
            said += line
            if line.startswith("from the login node"):
                break
        assert "ready: http://10.0.0.1:8000/v1" in said, said
        token = tmp_path / ".moe-ray" / "4711" / "token"
        assert len(token.read_text()) == 64
        assert token.stat().st_mode & 0o777 == 0o600
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 143
    finally:
        job.kill()
    assert not token.parent.exists()
    log = Path(slurm["LOG"]).read_text().splitlines()
    starts = [line for line in log if "ray start" in line]
    assert [line.split(":")[0] for line in starts] == ["n1", "n2", "n3"]
    assert "--head" in starts[0]
    assert "--labels moe-ray/role=trunk" in starts[0]
    for line in starts[1:]:
        assert "--address 10.0.0.1:24711" in line
        assert "--labels moe-ray/role=experts" in line
    assert any(line.startswith("n1: serve deploy --address http://127.0.0.1:44711") for line in log)
    assert [line for line in log if line.endswith(": ended")] == ["n3: ended", "n2: ended", "n1: ended"]


def test_a_job_ends_with_the_node_that_ends(slurm: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen([SCRIPT], env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("from the login node"):
                break
        lost = shell("pgrep", "-f", f"{tmp_path}/venv/bin/ray start.*--address").stdout.split()
        os.kill(int(lost[0]), signal.SIGTERM)
        rest = job.stdout.read()
        assert job.wait(timeout=20) == 1
        assert "a node ended" in rest
    finally:
        job.kill()
    time.sleep(0.3)
    assert shell("pgrep", "-f", f"{tmp_path}/venv/bin/ray start").stdout == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"SLURM_JOB_ID": None}, "run me with sbatch"),
        ({"MOE_RAY_VENV": "/nowhere"}, "no moe_ray in /nowhere"),
    ],
)
def test_errors_are_clear(slurm: dict[str, str], change: dict[str, str | None], says: str) -> None:
    environment = {name: value for name, value in {**slurm, **change}.items() if value is not None}
    said = shell(SCRIPT, env=environment)
    assert said.returncode == 1
    assert says in said.stderr
