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
from cluster_files import tool as make_tool

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
        "ray": f"""case $1 in
            start) echo "$NODE: drains for $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s" >>"$LOG"
            trap '[ -e {tmp_path}/.moe-ray/4711/token ] || echo "$NODE: no token is left" >>"$LOG"
            sleep "${{SLOW:-0}}"; echo "$NODE: ended" >>"$LOG"; exit 0' TERM; while :; do sleep 0.1; done;;
            esac""",
        "serve": """test -s "$RAY_AUTH_TOKEN_PATH" || exit 1
            case $1 in
            status) test -e "$LOG.deployed" && printf '%s\\n' 'applications:' '  moe-ray:' '    status: RUNNING' \\
                '    message: ""' '    last_deployed_time_s: 7.5' '    deployments: {}';;
            *) echo "$NODE: serve $*" >>"$LOG"; touch "$LOG.deployed";;
            esac""",
        # Its server wants a key where the job has one.
        "curl": """echo "$*" >>"$LOG.curl"; while (($#)); do [[ $1 == -H ]] && key=$(<"${2#@}"); shift; done
            if [[ -z $OPENAI_API_KEY || $key == "Authorization: Bearer $OPENAI_API_KEY" ]]
            then printf '{"data": [{"id": "m"}]}\\n200'; elif grep -q /health <<<"$(tail -1 "$LOG.curl")"
            then printf 'ok\\n200'; else printf '{}\\n401'; fi""",
        "python3": f"""case "$*" in *ray.init*) echo 3;; *) exec {sys.executable} "$@";; esac""",
    }
    for name, text in tools.items():
        make_tool(tmp_path / "venv" / "bin" / name, text)
    environment = clean_environment(tmp_path)
    environment.pop("OPENAI_API_KEY", None)
    return environment | {
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
        key = token.with_name("api_key")
        assert key.stat().st_mode & 0o777 == 0o600
        assert f"export OPENAI_API_KEY=$(cat {key})" in said
        assert '"model": "m"' in said, "it asked with the key of this job"
        assert key.read_text().strip() not in said + Path(slurm["LOG"]).read_text()
        assert key.read_text().strip() not in Path(slurm["LOG"] + ".curl").read_text()
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
    ended = [line for line in log if line.endswith(": ended")]
    assert (sorted(ended[:2]), ended[2:]) == (["n2: ended", "n3: ended"], ["n1: ended"]), "the head last"
    assert sum(line.endswith(": no token is left") for line in log) == 3
    assert sum(line.endswith(": drains for 0 s") for line in log) == 3
    assert log[-1].endswith("rm -rf /tmp/ray-4711")


@pytest.mark.slow
def test_workers_end_at_once_and_not_in_turns(slurm: dict[str, str], tmp_path: Path) -> None:
    """scancel kills after 30 s, however many nodes there are."""
    job = subprocess.Popen([SCRIPT], env={**slurm, "SLOW": "3"}, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("from the login node"):
                break
        job.send_signal(signal.SIGTERM)
        began = time.monotonic()
        job.send_signal(signal.SIGTERM)  # impatience does not cut it short
        assert job.wait(timeout=20) == 143
        took = time.monotonic() - began
    finally:
        job.kill()
    assert 5 < took < 8.5, "two workers together, then the head"
    assert Path(slurm["LOG"]).read_text().splitlines()[-1].endswith("rm -rf /tmp/ray-4711")


def test_a_job_shares_its_nodes_with_nobody() -> None:
    assert "#SBATCH --exclusive" in SCRIPT.read_text().split("set -euo pipefail")[0].splitlines()


@pytest.mark.parametrize("keys", ['["theirs"]', "[]"])
def test_keys_that_are_set_are_kept(slurm: dict[str, str], keys: str, tmp_path: Path) -> None:
    tool = Path(slurm["MOE_RAY_VENV"]) / "bin" / "ray"
    make_tool(tool, f'echo "keys $MOE_RAY_GATEWAY__API_KEYS" >>"$LOG"\n{tool.read_text()}')
    job = subprocess.Popen(
        [SCRIPT], env={**slurm, "MOE_RAY_GATEWAY__API_KEYS": keys}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        for line in job.stdout:
            assert "it asks for a key, which is in a file" not in line
            if line.startswith("from the login node"):
                break
        assert not (tmp_path / ".moe-ray" / "4711" / "api_key").exists()
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 143
    finally:
        job.kill()
    assert f"keys {keys}" in Path(slurm["LOG"]).read_text()


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
