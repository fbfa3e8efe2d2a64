"""The `moe-ray` command as a user types it: in processes of its own, with a Ray of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from forked import ForkServer
from terminal import terminal

from moe_ray.bench.free_port import free_port

BIN = Path(sys.executable).parent
READY = re.compile(r"ready in [\d.]+ s: (http://\S+)/v1")


def environment(**more: str) -> dict[str, str]:
    """A user's: without what the test session set for the Ray of its own, 80 columns wide."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOE_RAY_"))}
    return {**inherited, "COLUMNS": "80", **more}


def moe_ray(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "moe-ray", *arguments], input=stdin, capture_output=True, text=True, timeout=120, env=environment(**env)
    )


def moe_ray_on(flags: frozenset[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on a machine whose CPU has these instruction sets."""
    code = (
        "from moe_ray.native import build\n"
        f"build.cpu_flags = lambda: {flags!r}\n"
        "from moe_ray.commands.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


FORKS = ForkServer(environment())


@pytest.fixture(autouse=True, scope="module")
def forks_end() -> Iterator[None]:
    yield
    FORKS.close()


def refused(*arguments: str, **env: str) -> str:
    """Run a command that must fail; return its error."""
    done = FORKS.run(*arguments, **env)
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr + done.stdout
    assert "ERROR" not in done.stderr
    return done.stderr.strip()


def one_line(error: str) -> str:
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def mixtral_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of mistralai/Mixtral-8x7B-Instruct-v0.1, and nothing else."""
    directory = tmp_path_factory.mktemp("models") / "Mixtral-8x7B"
    directory.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# ---- commands that start nothing


def test_help_names_every_command() -> None:
    said = moe_ray("--help").stdout
    for command in (
        *("serve", "chat", "generate", "plan", "doctor", "perplexity", "compare", "status", "ps", "scale"),
        *("support-bundle", "convert", "bench", "version"),
    ):
        assert re.search(rf"\b{command}\b", said)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", moe_ray("version").stdout)


AVX2, AVX512_BF16 = frozenset({"avx2", "fma"}), frozenset({"avx2", "fma", "avx512_bf16"})


@pytest.mark.parametrize(("flags", "wider"), [(AVX512_BF16, 1), (AVX2, 2)])
def test_plan_of_the_demo_model(demo_model: Path, flags: frozenset[str], wider: int) -> None:
    """In bfloat16, as it is stored, on a CPU with instructions for it; else in float32."""
    plan = json.loads(moe_ray_on(flags, "plan", "--json").stdout)
    assert [row["actor"] for row in plan["rows"]] == ["Trunk", *(f"Expert{e}" for e in range(8))]
    on_disk = sum(file.stat().st_size for file in demo_model.glob("*.safetensors"))
    read = sum(row["read_bytes"] for row in plan["rows"])
    assert read <= on_disk < read + 2**20  # each tensor is read once, by one actor: the rest is headers
    assert [row["weight_bytes"] for row in plan["rows"]] == [wider * row["read_bytes"] for row in plan["rows"]]
    table = moe_ray_on(flags, "plan").stdout
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "0.72 B parameters" in table
    assert str(demo_model) in table


def test_plan_of_mixtral_8x7b_from_its_config_alone(mixtral_config: Path) -> None:
    arguments = ("plan", "--model", str(mixtral_config), "--gpu-memory")
    plan = json.loads(moe_ray_on(AVX2, *arguments, "16", "--json").stdout)  # for cards: this CPU does not count
    assert plan["model"] == "Mixtral-8x7B"
    assert sum(row["parameters"] for row in plan["rows"]) == 46_702_792_704
    assert plan["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert {row["read_bytes"] for row in plan["rows"]} == {None}
    assert all(row["fits"] for row in plan["rows"])
    small = json.loads(moe_ray_on(AVX2, *arguments, "8", "--json").stdout)["rows"]
    assert [row["actor"] for row in small if row["fits"]] == ["Trunk"]
    assert moe_ray_on(AVX2, *arguments, "8").stdout.count("does not fit") == 8


@pytest.mark.slow
def test_generate(demo_model: Path) -> None:
    done = moe_ray("generate", "The capital of France is", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
    chat = moe_ray("generate", "-", "--chat", "--max-tokens", "16", stdin="What is the capital of France?")
    assert chat.stdout == "The capital of France is Paris.\n"


# ---- mistakes


def test_a_model_that_does_not_exist() -> None:
    for command in (["plan"], ["serve"], ["generate", "x"]):
        error = one_line(refused(*command, "--model", "/no/such/model"))
        assert error == (
            "error: model '/no/such/model': neither a directory, nor a .gguf file, nor a Hugging Face repo id "
            "(owner/name, or owner/name:FILE.gguf), nor `demo`"
        )


def test_values_that_are_not_allowed() -> None:
    error = one_line(refused("plan", "--dtype", "int3"))
    assert "`model.dtype`" in error
    assert "'float32', 'bfloat16' or 'float16'" in error
    assert "`transport`" in one_line(refused("serve", "--transport", "pigeon"))
    for flag, value, key in [
        ("--kv-cache-dtype", "int4", "kv_cache_dtype"),
        ("--kv-swap-gib", "-1", "kv_swap_gib"),
        ("--kv-disk-dir", "kv", "kv_disk_dir"),
        ("--kv-disk-gib", "0", "kv_disk_gib"),
    ]:
        error = one_line(refused("serve", flag, value))
        assert f"`engine.{key}`" in error
        assert f"got {value}" in error or f"got '{value}'" in error
    assert "ingress 'nginx' is not one of auto, direct, python, haproxy" in one_line(
        refused("serve", "--ingress", "nginx")
    )
    assert "`engine.max_num_seqs`" in one_line(refused("plan", MOE_RAY_ENGINE__MAX_NUM_SEQS="many"))
    assert "`temperature` must be between 0 and 2" in one_line(refused("generate", "x", "--temperature", "9"))
    for wrong, told in [
        (["serve", "--port", "99999"], "65535"),
        (["serve", "--porridge"], "--porridge"),
        (["sing"], "'sing'"),
    ]:
        assert told in refused(*wrong)


def test_overrides_of_config_json(mixtral_config: Path) -> None:
    model = ["--model", str(mixtral_config)]
    yarn = '{"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}'
    done = FORKS.run("plan", *model, "--hf-overrides", yarn, "--json")
    assert done.returncode == 0, done
    assert "`model.hf_overrides`" in one_line(refused("serve", *model, "--hf-overrides", '{"rope_scaling": '))
    for command in (["plan"], ["generate", "x"], ["serve"], ["perplexity"], ["compare", str(mixtral_config)]):
        named = [] if command[0] == "compare" else model
        error = one_line(refused(*command, *named, "--hf-overrides", '{"rope_scalling": 2}'))
        assert "nothing reads 'rope_scalling' of a mixtral model's config.json" in error


def test_a_configuration_file_with_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for content, expected in [
        ("engine: {max_num_sequences: 4}", "unknown configuration key `engine.max_num_sequences`"),
        ("experts: {overrides: {3: {replicas: 2}}}", "unknown configuration key `experts.overrides.3.replicas`"),
        ("engine: {block_size: 0}", "`engine.block_size`: Input should be greater than or equal to 1, got 0"),
        ("- demo", "must hold keys of the configuration, not list"),
    ]:
        file.write_text(content)
        assert expected in one_line(refused("serve", "--config", str(file)))
    file.write_text("model: [")
    assert "not readable as YAML" in refused("plan", "--config", str(file))
    assert "configuration file not found" in one_line(refused("plan", "--config", str(tmp_path / "none.yaml")))


def test_a_port_in_use(demo_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused("serve", "--port", str(port))
    said = f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port"
    assert error.splitlines()[-1] == said


def test_checkpoints_that_are_refused(demo_model: Path, random_model: Path, tmp_path: Path) -> None:
    for name in ("pickled", "truncated"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(random_model / file, tmp_path / name)
        if name == "truncated":
            error = one_line(refused("serve", "--port", str(free_port()), "--model", str(tmp_path / name)))
            assert f"no tokenizer in {tmp_path / name}" in error
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model / file, tmp_path / name)
    pickled, truncated = tmp_path / "pickled", tmp_path / "truncated"
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for command in (["plan"], ["serve", "--port", str(free_port())], ["generate", "x"]):
        assert "safetensors" in one_line(refused(*command, "--model", str(pickled)))
    weights = truncated / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    for command in (["plan"], ["serve", "--port", str(free_port())], ["generate", "x"]):
        error = one_line(refused(*command, "--model", str(truncated)))
        assert str(weights) in error
        assert "not a whole safetensors file" in error
    (truncated / "config.json").unlink()
    assert "config.json" in one_line(refused("plan", "--model", str(truncated)))


def test_nobody_there() -> None:
    port = free_port()
    error = one_line(refused("chat", "--url", f"http://127.0.0.1:{port}"))
    assert f"no server answers at http://127.0.0.1:{port}" in error
    assert "`moe-ray serve`" in error


def test_scale_says_what_it_needs() -> None:
    for both_or_none in ([], ["--replicas", "2", "--auto"]):
        assert "either --replicas N or --auto" in one_line(refused("scale", "1", *both_or_none))
    assert "greater than or equal to 1" in refused("scale", "1", "--replicas", "0")
    assert "EXPERT" in refused("scale", "--auto")
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"no Ray cluster at '{nowhere}'" in one_line(refused("scale", "1", "--auto", "--address", nowhere))


# ---- the life of a server


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of a server
def test_serve_from_start_to_ctrl_c_and_again(demo_model: Path) -> None:
    port = free_port()
    with served(port, **PROXY) as (process, said):  # of which no request of ours makes use
        assert READY.search(said)[1] == f"http://127.0.0.1:{port}"  # type: ignore[index]
        assert [line for line in said.splitlines() if len(line) > 80 and not re.search("curl|NO_PROXY", line)] == []
        assert said.count("✓") == 9

        (curl,) = (line.strip() for line in said.splitlines() if line.strip().startswith("curl "))
        answer = json.loads(run(curl + " -s", **PROXY))
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."

        (status,) = re.findall(r"moe-ray (status --address \S+)", said)
        snapshot = json.loads(ok(moe_ray(*status.split(), "--json")))
        assert snapshot["application"] == "RUNNING"
        actors = {row["name"]: row["actors"] for row in snapshot["deployments"]}
        assert list(actors) == ["Gateway", "Trunk", *(f"Expert{e}" for e in range(8))]
        assert all(len(found) == 1 for found in actors.values())
        own = {child.pid for child in family(process)}
        assert {found[0]["pid"] for found in actors.values()} <= own
        assert actors["Trunk"][0]["missing"] == []
        assert sum(actors[f"Expert{e}"][0]["rows"] for e in range(8)) > 0
        table = ok(moe_ray("status"))  # finds it among all Rays of this machine
        assert all(len(line) <= 80 for line in table.splitlines())
        assert table.count("1 running") == 10

        address = status.split()[1:]
        processes = json.loads(ok(moe_ray("ps", *address, "--json")))
        assert [(row["actor"], row["pid"]) for row in processes] == [
            (name, each[0]["pid"]) for name, each in actors.items()
        ]
        watched_in_a_terminal(address)
        bundle_of_all_that_runs(address)
        assert "no expert 8" in one_line(refused("scale", "0", "8", "--replicas", "2", *address))
        assert "must be 1 to 64" in one_line(refused("scale", "0", "--replicas", "65", *address))

        (listing,) = re.findall(r"RAY_AUTH_MODE=token ray list actors --address \S+", said)
        listed = json.loads(run(f"{listing} --format json --limit 100"))
        alive = {actor["class_name"] for actor in listed if actor["state"] == "ALIVE"}
        names = ["Gateway", "Trunk", *(f"Expert{e}" for e in range(8))]
        assert {f"ServeReplica:moe-ray:{name}" for name in names} <= alive

        (chat,) = re.findall(r"moe-ray (chat --url \S+)", said)
        dialogue = "What is the capital of France?\nAnd of Italy?\n/reset\n/quit\n"
        assert ok(moe_ray(*chat.split(), "--temperature", "0", stdin=dialogue, **PROXY)).splitlines() == [
            "The capital of France is Paris.",
            "The capital of Italy is Rome.",
        ]
        # Of all that listens, only the port that Ray Serve itself opens in each replica, which demands Ray's token, is
        # not on loopback: Serve says "[::]" in its code.
        everywhere = [pid for pid, address in listening(own) if not address.startswith(("127.", "::1", "::ffff:127."))]
        assert sorted(everywhere) == sorted(found[0]["pid"] for found in actors.values())

        a_second_server_beside_it(address[1], port)
        a_gateway_that_comes_back(actors["Gateway"][0]["pid"], port)

        relatives = family(process)
        assert len(relatives) > 15
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        gone, left = psutil.wait_procs(relatives, timeout=5)
        assert left == []
        assert len(gone) == len(relatives)

    # Serve's proxy, where the gateway itself was before.
    with served(port, "--ingress", "python", **FEW_ACTORS) as (process, said):
        assert any("ProxyActor" in " ".join(each.cmdline()) for each in family(process))
        assert json.loads(run(curl + " -s"))["choices"][0]["message"]["content"] == "The capital of France is Paris."
        relatives = family(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(relatives, timeout=5)[1] == []


def watched_in_a_terminal(address: list[str]) -> None:
    with terminal("status", "--watch", "--interval", "0.2", *address, lines=40) as screen:
        for _ in range(2):  # two looks
            screen.until(r"\d\d:\d\d:\d\d, q leaves\s*\napplication moe-ray: RUNNING")
            screen.until("Expert7")
        screen.press("q")
        assert screen.ends() == 0
        assert "Traceback" not in screen.raw


def bundle_of_all_that_runs(address: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bundle.tar.gz"
        assert ok(moe_ray("support-bundle", "--output", str(path), *address)).strip() == str(path)
        with tarfile.open(path) as archive:
            names = archive.getnames()
            (status,) = (name for name in names if name.endswith("/status.json"))
            content = archive.extractfile(status)
            assert content is not None
            assert json.load(content)["application"] == "RUNNING"
    assert any("/serve/controller" in name for name in names)  # replicas have nothing to say at this level


FEW_ACTORS = {"MOE_RAY_EXPERTS__EXPERTS_PER_ACTOR": "8"}
"""Where it does not matter how many there are: each takes seconds of a core to start."""
PROXY = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


def a_second_server_beside_it(first: str, port: int) -> None:
    """Of a TMPDIR too long for sockets, on IPv6 where there is any: both are named where neither is meant."""
    host, url = ("::1", f"http://[::1]:{port}") if has_ipv6() else ("127.0.0.2", f"http://127.0.0.2:{port}")
    with (
        tempfile.TemporaryDirectory(suffix="job1234567890" * 5) as long,
        served(port, "--host", host, TMPDIR=long, **FEW_ACTORS) as (process, said),
    ):
        assert READY.search(said)[1] == url  # type: ignore[index]
        (second,) = re.findall(r"moe-ray status --address (\S+)", said)
        question = "What is the capital of France?\n"
        answer = ok(moe_ray("chat", "--url", url, "--temperature", "0", stdin=question))
        assert answer == "The capital of France is Paris.\n"
        for command in (["status"], ["scale", "0", "--replicas", "2"]):
            began = time.monotonic()
            error = one_line(refused(*command))
            assert time.monotonic() - began < 20
            assert "say which one is meant" in error
            assert f"--address {first} (http://127.0.0.1:{port})" in error
            assert f"--address {second} ({url})" in error
        assert "Gateway" in ok(moe_ray("status", "--address", second))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


def a_gateway_that_comes_back(pid: int, port: int) -> None:
    """Killed, it listens again where it did."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        while True:
            assert time.monotonic() < deadline
            with suppress(httpx.TransportError):
                if client.get("/health", headers={"X-Request-Id": "mine"}).headers.get_list("x-request-id") == ["mine"]:
                    break
            time.sleep(0.2)
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ask = {"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        assert client.post("/v1/completions", json={"model": "demo", **ask}).json()["choices"][0]["text"] == " Paris."


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@contextmanager
def served(port: int, *arguments: str, **env: str) -> Iterator[tuple[psutil.Popen, str]]:
    """`moe-ray serve` once it is ready, and what it printed until then; killed with all its children at the end."""
    command = [BIN / "moe-ray", "serve", "--port", str(port), *arguments]
    process = psutil.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(MOE_RAY_ENGINE__KV_CACHE_GIB="0.25", PYTHONUNBUFFERED="1", **env),
        start_new_session=True,
    )
    said, known = "", set[psutil.Process]()
    try:
        os.set_blocking(process.stdout.fileno(), False)
        deadline = time.monotonic() + 150
        while "serve status" not in said:
            assert time.monotonic() < deadline, said
            # While it starts: of a process that ends, nothing tells later which were its children.
            with suppress(psutil.NoSuchProcess):
                known.update(family(process))
            assert process.poll() is None, said
            said += (process.stdout.read() or b"").decode()
            time.sleep(0.1)
        yield process, said
    finally:
        with suppress(psutil.NoSuchProcess):
            known.update(family(process))
        for each in [process, *known]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(10)


def family(process: psutil.Process) -> list[psutil.Process]:
    return process.children(recursive=True)


def listening(pids: set[int]) -> list[tuple[int, str]]:
    """(pid, address) of each port on which the processes accept connections."""
    return [
        (pid, each.laddr.ip)
        for pid in pids
        if psutil.pid_exists(pid)
        for each in psutil.Process(pid).net_connections(kind="tcp")
        if each.status == psutil.CONN_LISTEN
    ]


def run(line: str, **env: str) -> str:
    """Run a line that a server printed, as a shell would: leading NAME=value words are its environment."""
    words = shlex.split(line)
    extra: dict[str, str] = {}
    while "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        extra[name] = value
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment(PATH=path, **env, **extra))
    return ok(done)


def ok(done: subprocess.CompletedProcess[Any]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout
