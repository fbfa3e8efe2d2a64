"""The bare-metal scripts: clean for shellcheck, clear in what they say, and two real nodes that answer a question."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil
import pytest
import yaml
from cluster_files import CLUSTER, clean_environment, module, shell, tool
from random_mixtral import save_random_mixtral

from moe_ray.core import TierStats

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


RAY = 'env >"$HOME/environment"; echo Ray runtime started; exec sleep 1'


def with_tools(home: Path, **tools: str) -> dict[str, str]:
    """A newcomer's environment in which these commands come first."""
    for name, script in tools.items():
        tool(home / "bin" / name, script)
    environment = clean_environment(home)
    environment.pop("OPENAI_API_KEY", None)
    return environment | {"PATH": f"{home}/bin:{environment['PATH']}"}


def test_a_token_as_ray_makes_it_is_taken_and_closed(tmp_path: Path) -> None:
    """`ray get-auth-token --generate` leaves it to the umask: 0644."""
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    environment = with_tools(tmp_path, ray=RAY)
    said = shell(SCRIPTS / "start-worker.sh", "--address", "h:1", "--token-file", token, env=environment)
    assert said.returncode == 0, said.stderr
    assert f"{token} could be read by others: its mode is 600 now\n" in said.stdout
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_token_of_somebody_else_that_others_can_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a file away")
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    os.chown(token, 12345, 12345)
    environment = with_tools(tmp_path, ray=RAY)
    said = shell(SCRIPTS / "start-worker.sh", "--address", "h:1", "--token-file", token, env=environment)
    assert said.returncode == 1
    assert f"not yours to change: chmod 600 {token}" in said.stderr
    assert token.stat().st_mode & 0o777 == 0o644


def test_ray_finds_a_token_that_was_named_from_here(tmp_path: Path) -> None:
    """Its processes have other working directories."""
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    environment = with_tools(tmp_path, ray=RAY)
    said = shell(
        SCRIPTS / "start-worker.sh", "--address", "h:1", "--token-file", "token", env=environment, cwd=tmp_path
    )
    assert said.returncode == 0, said.stderr
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path}/token" in (tmp_path / "environment").read_text().splitlines()


@pytest.mark.parametrize("where", [".ray/auth_token", "elsewhere"])
def test_the_head_says_how_shells_get_in(where: str, tmp_path: Path) -> None:
    token = tmp_path / where
    said = shell(SCRIPTS / "start-head.sh", "--token-file", token, env=with_tools(tmp_path, ray=RAY))
    assert said.returncode == 0, said.stderr
    (exports,) = re.findall(r"^  shells:  (export .*?)(?:  |$)", said.stdout, re.M)
    probe = shell("bash", "-c", f"{exports}; echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH", env=clean_environment(tmp_path))
    assert probe.stdout.split() == (["token"] if where.startswith(".ray") else ["token", str(token)])


def test_the_log_of_the_last_time_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "state" / "moe-ray").mkdir(parents=True)
    log = tmp_path / "state" / "moe-ray" / "head.log"
    log.write_text("Ray runtime started\n")
    # A slow machine: the process that will write the log takes a while to begin.
    environment = with_tools(tmp_path, setsid="sleep 1; echo no ports; exit 1")
    said = shell(SCRIPTS / "start-head.sh", env=environment)
    assert said.returncode == 1
    assert "no ports" in said.stderr
    assert log.read_text() == "no ports\n"


def test_the_readme_brings_the_token_to_a_fresh_machine(tmp_path: Path) -> None:
    """ssh and scp of this test run what they are told in a home directory per host."""
    (line,) = re.findall(r"^(.*\bscp .*?)(?:  +#.*)?$", (CLUSTER / "README.md").read_text(), re.M)
    environment = with_tools(
        tmp_path,
        ssh='export HOME=$HOSTS/$1; mkdir -p "$HOME"; cd "$HOME"; shift; exec bash -c "$*"',
        scp='[[ $1 != -p ]] || shift; cp -p "$1" "$HOSTS/${2%%:*}/${2#*:}"',
    )
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    ran = shell("bash", "-c", line, env={**environment, "HOSTS": str(tmp_path / "hosts")})
    assert ran.returncode == 0, ran.stderr
    there = tmp_path / "hosts" / "B" / ".ray"
    assert (there / "auth_token").read_text() == "secret"
    assert there.stat().st_mode & 0o777 == 0o700


def test_deploy_renders_variables_and_names_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "app.yaml"
    config.write_text("# ${NOT_READ}\nhost: ${A:-127.0.0.1}\nport: ${PORT}\n")
    environment = clean_environment(tmp_path)
    said = shell(SCRIPTS / "deploy.sh", "--render", config, env=environment)
    assert said.returncode == 1
    assert said.stderr == f"error: {config} needs the environment variable PORT\n"
    said = shell(SCRIPTS / "deploy.sh", "--render", config, env={**environment, "PORT": "9000"})
    assert said.stdout == "# ${NOT_READ}\nhost: 127.0.0.1\nport: 9000\n"


def serve_says(status: str, deployed: float, message: str = "", expert: str = "HEALTHY", why: str = "") -> str:
    """What `serve status` prints of the application with one expert, by Ray's own code."""
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus
    from ray.serve.scripts import ServeDeploySchemaDumper, process_dict_for_yaml_dump

    one = DeploymentStatusOverview(
        status=expert, status_trigger="UNSPECIFIED", replica_states={"RUNNING": 1}, message=why
    )
    application = ApplicationStatusOverview(
        status=status, message=message, last_deployed_time_s=deployed, deployments={"Expert3": one}
    )
    said = process_dict_for_yaml_dump(asdict(ServeStatus(applications={"moe-ray": application}, target_capacity=None)))
    return yaml.dump(said, Dumper=ServeDeploySchemaDumper, default_flow_style=False, sort_keys=False)


@dataclass
class Gateway:
    """A server on loopback that is healthy and may ask for a key; it notes when it was asked for what."""

    key: str = ""
    healthy: bool = True
    port: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    here = Gateway()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = self.headers.get("Authorization", "")
            here.asked.append((self.path, shown))
            status, body = 200, '{"data": [{"id": "small"}]}'
            if self.path == "/health":
                status, body = (200, "{}") if here.healthy else (503, "no trunk")
            elif here.key and shown != f"Bearer {here.key}":
                status, body = 401, "{}"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield here
        server.shutdown()


def deploy(
    home: Path, gateway: Gateway, says: list[str], timeout_s: int = 30, **environment: str
) -> subprocess.CompletedProcess[str]:
    """deploy.sh with a `serve` that says one thing after the other, the first before it deploys, and an old curl."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret")
    (home / ".ray" / "auth_token").chmod(0o600)
    last = len(says) - 1
    for number, text in enumerate(says):
        (home / f"says-{number}").write_text(text)
    tools = with_tools(
        home,
        serve=f"""cd {home}; echo "$1" >>calls; [[ $1 == status ]] || exit 0
            number=$(($(grep -c status calls) - 1)); cat "says-$((number > {last} ? {last} : number))" """,
        curl=f"""printf '%s\\n' "$*" >>{home}/arguments
            [[ $* != *--fail-with-body* ]] || {{ echo 'curl: option --fail-with-body: is unknown' >&2; exit 2; }}
            exec {shutil.which("curl")} "$@" """,
        sleep="exec /bin/sleep 0.1",
    )
    tools |= {"HTTP_PORT": str(gateway.port), "no_proxy": "127.0.0.1", **environment}
    return shell(
        SCRIPTS / "deploy.sh", "--timeout", str(timeout_s), CLUSTER / "serve" / "demo.yaml", env=tools, timeout=60
    )


def test_deploy_waits_for_the_new_application_though_the_old_one_answers(gateway: Gateway, tmp_path: Path) -> None:
    says = [
        serve_says("RUNNING", 100.25),  # before
        serve_says("RUNNING", 100.25),  # not taken up yet
        "",  # the dashboard is busy
        serve_says("DEPLOYING", 200.5, expert="UPDATING", why="1 replica has no\nresources."),
        serve_says("RUNNING", 200.5),
    ]
    said = deploy(tmp_path, gateway, says)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[:3] == [
        "waiting: moe-ray is not taken up yet",
        "waiting: moe-ray is DEPLOYING, Expert3: 1 replica has no resources.",
        f"ready: http://127.0.0.1:{gateway.port}/v1",
    ]
    assert '"model": "small"' in said.stdout
    assert (tmp_path / "calls").read_text().split() == ["status", "deploy", *["status"] * 4]
    assert [path for path, _ in gateway.asked] == ["/health", "/v1/models"]


def test_deploy_says_why_the_application_failed(gateway: Gateway, tmp_path: Path) -> None:
    """And does not take the failure of the one before for it."""
    failed = ("DEPLOY_FAILED", 2.0, "Failed to update the deployments ['Expert3'].", "DEPLOY_FAILED")
    before = serve_says("DEPLOY_FAILED", 1.0, "the old story")
    said = deploy(tmp_path, gateway, [before, before, serve_says(*failed, "No such file: config.json\n  at line 3")])
    assert said.returncode == 1
    assert "the old story" not in said.stderr
    assert "Failed to update the deployments ['Expert3']." in said.stderr
    assert "Expert3: No such file: config.json\n  at line 3\n" in said.stderr
    assert gateway.asked == []


def test_deploy_gives_up_with_what_is_missing(gateway: Gateway, tmp_path: Path) -> None:
    gateway.healthy = False
    said = deploy(tmp_path, gateway, [serve_says("RUNNING", 1.0), serve_says("RUNNING", 2.0)], timeout_s=2)
    assert said.returncode == 1
    assert f"not ready after 2 s: http://127.0.0.1:{gateway.port}/health says 503: no trunk\n" in said.stderr


def test_deploy_says_that_nobody_answers(gateway: Gateway, tmp_path: Path) -> None:
    gateway.port = 1
    said = deploy(tmp_path, gateway, [serve_says("RUNNING", 1.0), serve_says("RUNNING", 2.0)], timeout_s=1)
    assert "/health says 000: curl: (7)" in said.stderr


def test_a_key_is_shown_only_where_one_is_asked_for(gateway: Gateway, tmp_path: Path) -> None:
    says = [serve_says("RUNNING", 1.0), serve_says("RUNNING", 2.0)]
    said = deploy(tmp_path, gateway, says, OPENAI_API_KEY="s3cret")
    assert said.returncode == 0, said.stderr
    assert [shown for _, shown in gateway.asked] == ["", ""]
    assert "Authorization" not in said.stdout


def test_a_key_is_no_argument_of_a_command(gateway: Gateway, tmp_path: Path) -> None:
    """`ps` of every user of the machine would show it."""
    gateway.key = "s3cret"
    says = [serve_says("RUNNING", 1.0), serve_says("RUNNING", 2.0)]
    said = deploy(tmp_path, gateway, says, OPENAI_API_KEY="s3cret")
    assert said.returncode == 0, said.stderr
    assert gateway.asked[1:] == [("/v1/models", ""), ("/v1/models", "Bearer s3cret")]
    assert '"model": "small"' in said.stdout
    line = next(line.strip() for line in said.stdout.splitlines() if line.startswith("  curl "))
    environment = with_tools(tmp_path) | {"OPENAI_API_KEY": "s3cret", "no_proxy": "127.0.0.1"}
    shell("bash", "-c", line.replace("/v1/chat/completions", "/v1/models").split(" -d ")[0], env=environment)
    assert gateway.asked[-1] == ("/v1/models", "Bearer s3cret")
    assert (tmp_path / "arguments").read_text().count("/v1/models") == 3
    assert "s3cret" not in (tmp_path / "arguments").read_text()


def test_deploy_says_that_a_key_is_missing(gateway: Gateway, tmp_path: Path) -> None:
    gateway.key = "s3cret"
    said = deploy(tmp_path, gateway, [serve_says("RUNNING", 1.0), serve_says("RUNNING", 2.0)])
    assert said.returncode == 0, said.stderr
    assert "it asks for a key: put one into OPENAI_API_KEY\n" in said.stdout


def test_every_application_of_a_file_is_waited_for() -> None:
    progress = module(CLUSTER / "serve" / "deployed.py").progress
    first = yaml.safe_load(serve_says("RUNNING", 2.0))
    assert progress(["moe-ray"], first, {}) == ("running", "")
    assert progress(["moe-ray", "other"], first, {"moe-ray": 1.0}) == ("waiting", "other is not taken up yet")
    first["applications"]["other"] = {**first["applications"]["moe-ray"], "status": "UNHEALTHY"}
    assert progress(["moe-ray", "other"], first, {"moe-ray": 1.0}) == ("waiting", "other is UNHEALTHY")


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
    for each in tools.iterdir():
        each.chmod(0o755)
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
    """A random Mixtral with the demo model's tokenizer and chat template, for native kernels: experts load no torch."""
    import torch

    return save_random_mixtral(
        tmp_path / "model",
        seed=0,
        dtype=torch.bfloat16,
        like=demo_model,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )


EVENTS = {  # counters of what did not happen here, and GPUs
    *(f"pool_{name}_total" for name in ("splits", "retries", "hedges", "hedge_wins", "cancelled", "quarantines")),
    *(f"trunk_{name}_total" for name in ("preemptions", "degraded_tokens", "prefix_hit_tokens")),
    *(f"trunk_{name}_total" for name in ("drafts", "draft_tokens", "accepted_draft_tokens")),
    *(f"trunk_{each.name}_total" for each in fields(TierStats)),
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


@pytest.mark.slow
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
