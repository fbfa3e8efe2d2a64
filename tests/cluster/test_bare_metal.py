"""The bare-metal scripts: clean for shellcheck, clear in what they say, and two real nodes that answer a question."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cluster_files import CLUSTER, clean_environment, shell

SCRIPTS = CLUSTER / "bare-metal"
COMMANDS = ("start-head.sh", "start-worker.sh", "deploy.sh", "stop.sh")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_that_the_script_knows(name: str, tmp_path: Path) -> None:
    said = shell(SCRIPTS / name, "--help", env=clean_environment(tmp_path))
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Usage: ") == 1
    known = set(re.findall(r"^ +(--[a-z-]+)\)", (SCRIPTS / name).read_text(), re.M))
    assert known == set(re.findall(r"^  (--[a-z-]+)", said.stdout, re.M))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["start-head.sh", "--prot", "1"], "unknown option '--prot'"),
        (["start-head.sh", "--port"], "--port needs a value"),
        (["start-head.sh", "--port", "x"], "--port takes a whole number, not 'x'"),
        (["start-worker.sh"], "--address HEAD:PORT is needed"),
        (["start-worker.sh", "--address", "h:1", "--role", "expert"], "must be trunk or experts"),
        (["start-worker.sh", "--address", "h:1"], "no token in"),
        (["deploy.sh"], "which config file?"),
        (["deploy.sh", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_errors_are_one_clear_line(command: list[str], says: str, tmp_path: Path) -> None:
    said = shell(SCRIPTS / command[0], *command[1:], env=clean_environment(tmp_path))
    assert said.returncode == 1
    assert said.stderr.startswith("error: ")
    assert says in said.stderr
    assert said.stderr.count("\n") == 1


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    said = shell(
        SCRIPTS / "start-worker.sh", "--address", "h:1", "--token-file", token, env=clean_environment(tmp_path)
    )
    assert f"chmod 600 {token}" in said.stderr


def test_deploy_renders_variables_and_names_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "app.yaml"
    config.write_text("# ${NOT_READ}\nhost: ${A:-127.0.0.1}\nport: ${PORT}\n")
    environment = clean_environment(tmp_path)
    said = shell(SCRIPTS / "deploy.sh", "--render", config, env=environment)
    assert said.returncode == 1
    assert said.stderr == f"error: {config} needs the environment variable PORT\n"
    said = shell(SCRIPTS / "deploy.sh", "--render", config, env={**environment, "PORT": "9000"})
    assert said.stdout == "# ${NOT_READ}\nhost: 127.0.0.1\nport: 9000\n"


def test_stop_leaves_a_process_alone_that_is_not_ours(tmp_path: Path) -> None:
    """A process id may have been given to somebody else since."""
    state = tmp_path / "state" / "moe-ray"
    state.mkdir(parents=True)
    (state / "worker.pid").write_text(str(os.getpid()))
    said = shell(SCRIPTS / "stop.sh", env=clean_environment(tmp_path))
    assert said.stdout == "worker: was not running any more\n"
    assert not list(state.iterdir())


def test_workers_are_started_over_ssh_with_every_word_intact(tmp_path: Path) -> None:
    """ssh and scp of this test run what they are told in a directory per host."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text('#!/bin/bash\nmkdir -p "$HOSTS/$1"; cd "$HOSTS/$1"; shift; exec bash -c "$*"\n')
    (tools / "scp").write_text('#!/bin/bash\nshift; to=${!#}; cp "${@:1:$#-1}" "$HOSTS/${to%%:*}/${to#*:}"\n')
    (tools / "ray").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >arguments\necho Ray runtime started\nexec sleep 2\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    environment = clean_environment(tmp_path) | {"HOSTS": str(tmp_path / "hosts")}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    arguments = ["--address", "10.0.0.1:6379", "--role", "experts", "--labels", "zone=a", "--hosts", "x,y"]
    environment["MOE_RAY_STATE_DIR"] = "state"  # of each host, relative to where its shell is
    said = shell(
        SCRIPTS / "start-worker.sh", *arguments, "--token-file", token, "--resources", '{"disk": 2}', env=environment
    )
    assert said.returncode == 0, said.stderr + said.stdout
    for host in ("x", "y"):
        there = tmp_path / "hosts" / host
        assert (there / ".moe-ray" / "auth_token").read_text() == "secret"
        assert (there / ".moe-ray" / "auth_token").stat().st_mode & 0o777 == 0o600
        words = (there / "arguments").read_text().splitlines()
        assert words[:4] == ["start", "--block", "--address", "10.0.0.1:6379"]
        assert words[words.index("--resources") + 1] == '{"disk": 2}'
        assert words[words.index("--labels") + 1] == "moe-ray/role=experts,zone=a"


@dataclass(frozen=True)
class Host:
    """A network of its own on this machine, with one address that the other host reaches."""

    name: str
    ip: str
    home: Path

    def run(
        self, *command: str | Path, timeout: float = 60, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        env = clean_environment(self.home) | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"} | (environment or {})
        return shell("ip", "netns", "exec", self.name, *command, timeout=timeout, env=env)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire, so that no port meets another Ray of this machine."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip`")
    tag = uuid.uuid4().hex[:6]
    names = f"moe-{tag}-a", f"moe-{tag}-b"
    made, home = list[str](), Path("/tmp") / f"m{tag}"  # short: Ray's sockets are below it
    try:
        for name in names:
            if (done := shell("ip", "netns", "add", name)).returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            made.append(name)
        shell("ip", "link", "add", f"v{tag}a", "netns", names[0], "type", "veth", "peer", f"v{tag}b", "netns", names[1])
        found = []
        for name, end, ip in zip(names, (f"v{tag}a", f"v{tag}b"), ("10.77.41.1", "10.77.41.2"), strict=True):
            for command in (f"addr add {ip}/24 dev {end}", f"link set {end} up", "link set lo up"):
                done = shell("ip", "-n", name, *command.split())
                if done.returncode:
                    pytest.skip(f"no veth here: {done.stderr.strip()}")
            found.append(Host(name, ip, home / name[-1]))
            found[-1].home.mkdir(parents=True)
        yield found[0], found[1]
    finally:
        for name in made:
            left = shell("ip", "netns", "pids", name).stdout.split()
            for pid in map(int, left):
                if psutil.pid_exists(pid):
                    psutil.Process(pid).kill()
            shell("ip", "netns", "del", name)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def small_model(demo_model: Path, tmp_path: Path) -> Path:
    """A random Mixtral with the demo model's tokenizer and chat template."""
    from transformers import MixtralConfig, MixtralForCausalLM

    vocabulary = json.loads((demo_model / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    directory = tmp_path / "model"
    MixtralForCausalLM(config).save_pretrained(directory)
    for file in demo_model.glob("*token*"):
        shutil.copy(file, directory)
    for file in demo_model.glob("*.jinja"):
        shutil.copy(file, directory)
    return directory


EVENTS = {  # counters of what did not happen here, and GPUs
    *(f"pool_{name}_total" for name in ("splits", "retries", "hedges", "hedge_wins", "cancelled", "quarantines")),
    *(f"trunk_{name}_total" for name in ("preemptions", "degraded_tokens", "prefix_hit_tokens")),
    *(f"trunk_{name}_total" for name in ("draft_tokens", "accepted_draft_tokens")),
}
MAY_LACK = {f"ray_moe_ray_{name}" for name in EVENTS} | {
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_serve_num_http_error_requests_total",
}


def assert_exported(hosts: tuple[Host, Host], timeout_s: float = 60) -> None:
    """Every metric that alerts and dashboards read is among what the two nodes tell Prometheus."""
    texts = [(CLUSTER / "prometheus" / "rules.yaml").read_text()]
    texts += [path.read_text() for path in (CLUSTER / "grafana").glob("*.json")]
    wanted = set(re.findall(r"\b(ray_\w+)\{", " ".join(texts))) - MAY_LACK
    assert len(wanted) > 15
    end = time.monotonic() + timeout_s
    while True:
        scraped = "\n".join(host.run("curl", "-sS", f"http://{host.ip}:8080/metrics").stdout for host in hosts)
        if not (missing := wanted - set(re.findall(r"^(\w+)\{", scraped, re.M))):
            return
        assert time.monotonic() < end, f"nobody exports {missing}"
        time.sleep(1)


def test_two_nodes_answer_a_question_and_end(hosts: tuple[Host, Host], small_model: Path) -> None:
    head, worker = hosts
    told = head.run(
        SCRIPTS / "start-head.sh", "--ip", head.ip, "--temp-dir", head.home / "r", "--", "--metrics-export-port", "8080"
    )
    assert told.returncode == 0, told.stdout + told.stderr
    token = head.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    again = head.run(SCRIPTS / "start-head.sh")
    assert "head runs already" in again.stderr

    shutil.copytree(token.parent, worker.home / ".ray")
    join = ["--address", f"{head.ip}:6379", "--ip", worker.ip, "--role", "experts", "--num-cpus", "4"]
    told = worker.run(
        SCRIPTS / "start-worker.sh", *join, "--temp-dir", worker.home / "r", "--", "--metrics-export-port", "8080"
    )
    assert told.returncode == 0, told.stdout + told.stderr

    environment = {"MODEL": str(small_model), "MODEL_NAME": "small"}
    told = head.run(
        SCRIPTS / "deploy.sh", "--timeout", "200", CLUSTER / "serve" / "demo.yaml", timeout=240, environment=environment
    )
    assert told.returncode == 0, told.stdout + told.stderr
    curl = next(line.strip() for line in told.stdout.splitlines() if line.startswith("  curl "))
    answer = head.run("bash", "-c", f"{curl} -sS")
    assert '"choices"' in answer.stdout, answer.stdout + answer.stderr
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]

    assert_exported(hosts)
    ours = {int(pid) for host in hosts for pid in shell("ip", "netns", "pids", host.name).stdout.split()}
    assert len(ours) > 12
    for host in (worker, head):
        told = host.run(SCRIPTS / "stop.sh")
        assert told.returncode == 0, told.stdout + told.stderr
        assert "stopped" in told.stdout
    for host in hosts:
        assert shell("ip", "netns", "pids", host.name).stdout == "", "nothing of it is left"
