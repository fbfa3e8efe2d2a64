"""`moe-ray doctor` on machines with something wrong: the faults are real wherever a test may make them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_answers import hub

from moe_ray.bench.free_port import free_port
from moe_ray.config import load_config
from moe_ray.doctor import accelerators, environment, machine, network, ports
from moe_ray.doctor.accelerators import CardFacts
from moe_ray.doctor.environment import EnvironmentFacts, PackageState
from moe_ray.doctor.finding import Finding, Subject
from moe_ray.native import build, compilers

RUN = "from moe_ray.commands.main import main; main()"


def subject(environ: dict[str, str] | None = None, port: int = 8000, **flags: Any) -> Subject:
    return Subject(load_config(flags), None, environ or {}, port, "auto", False, lambda config, directory: 0)


def only(found: Sequence[Finding], check: str) -> Finding:
    (finding,) = (each for each in found if each.check == check)
    assert bool(finding.mend) == (finding.level != "ok")
    return finding


# ---- what is installed


def test_this_environment_is_as_pyproject_asks() -> None:
    found = [*environment.check_python(environment.installed_facts())]
    assert [each.level for each in found] == ["ok"]
    assert only(environment.check_packages(environment.installed_facts()), "packages").level == "ok"


@pytest.mark.parametrize(
    ("package", "says"),
    [
        (PackageState("ray[serve]==2.60.0", "2.59.1"), "ray 2.59.1, moe_ray needs ==2.60.0"),
        (PackageState("torch==2.13.0", "2.13.0+cpu"), None),
        (PackageState("transformers>=5.20,<6", "6.0"), "transformers 6.0, moe_ray needs <6,>=5.20"),
        (PackageState("rich>=14", None), "rich is not installed"),
        (PackageState("rich>=14", "15.0"), None),
    ],
)
def test_packages(package: PackageState, says: str | None) -> None:
    finding = only(environment.check_packages(EnvironmentFacts("3.11.1", ">=3.11", (package,))), "packages")
    assert (finding.level, finding.says) == ("error", says) if says else finding.level == "ok"
    if says:
        assert finding.mend == f"pip install {package.requirement!r}"


def test_an_old_python() -> None:
    assert only(environment.check_python(EnvironmentFacts("3.10.4", ">=3.11", ())), "python").level == "error"
    assert only(environment.check_packages(EnvironmentFacts("3.12.0", "", ())), "packages").level == "warning"


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_no_compiler(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler)
    facts = environment.native_facts(subject(cache_dir=str(tmp_path)))
    finding = only(environment.check_native(replace(facts, kernels="avx2")), "native kernels")
    assert finding.level == "warning"
    assert compiler in finding.says
    assert "torch computes" in finding.says
    assert (
        only(environment.check_native(replace(facts, kernels="avx2", wanted=True)), "native kernels").level == "error"
    )
    built = replace(facts, kernels="avx2", built=True)
    assert only(environment.check_native(built), "native kernels").level == "ok", "what is built needs no compiler"


def test_the_compiler_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert build.try_compiler(build.HOST) == compilers.find_compiler()


def test_a_cpu_without_kernels() -> None:
    facts = environment.NativeFacts("linux", "riscv64", None, False, "/usr/bin/c++", None, False)
    assert only(environment.check_native(facts), "native kernels").level == "warning"


# ---- cards

CARDS = CardFacts(2, "580.1", (13, 0), "2.13.0+cu130", "13.0", None, False)


@pytest.mark.parametrize(
    ("facts", "level", "says"),
    [
        (CARDS, "ok", "2 card(s), driver 580.1, torch for CUDA 13.0"),
        (CARDS, "ok", "without CUDA MPS: processes that share a card take turns on it"),
        (replace(CARDS, mps=True), "ok", "torch for CUDA 13.0; CUDA MPS runs"),
        (replace(CARDS, triton_lacks="a C compiler"), "warning", "2 card(s), but Triton's kernels need a C compiler"),
        (replace(CARDS, devices=0), "ok", "none; CPUs compute"),
        (replace(CARDS, devices=0, wanted=True), "error", "none, and model.device is cuda"),
        (replace(CARDS, torch="2.13.0+cpu", torch_cuda=None), "warning", "torch 2.13.0+cpu is built for CPUs only"),
        (replace(CARDS, driver_cuda=(12, 4)), "warning", "driver 580.1 speaks up to 12.4"),
        (replace(CARDS, driver_cuda=None, wanted=True), "error", "libcuda.so.1 is not there"),
        (replace(CARDS, visible=""), "warning", "hidden by CUDA_VISIBLE_DEVICES"),
        (replace(CARDS, visible="-1"), "warning", "hidden by CUDA_VISIBLE_DEVICES"),
        (replace(CARDS, visible="1"), "ok", "driver"),
    ],
)
def test_cards(facts: CardFacts, level: str, says: str) -> None:
    finding = only(accelerators.check_cards(facts), "cards")
    assert finding.level == level
    assert says in finding.says


def test_what_triton_compiles_its_driver_with(tmp_path: Path) -> None:
    assert accelerators.triton_lacks({"PATH": str(tmp_path)}) == "a C compiler"
    compiler = tmp_path / "gcc"
    compiler.touch(0o755)
    (tmp_path / "Python.h").touch()
    assert accelerators.triton_lacks({"PATH": str(tmp_path)}, tmp_path) is None
    assert accelerators.triton_lacks({"PATH": "", "CC": "cc"}, tmp_path) is None
    assert accelerators.triton_lacks({"PATH": str(tmp_path)}, tmp_path / "no") == f"Python's headers in {tmp_path}/no"


def test_the_daemon_of_mps_is_known_by_its_pipe(tmp_path: Path) -> None:
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not accelerators.mps_runs(environ)
    os.mkfifo(tmp_path / "control")
    assert accelerators.mps_runs(environ)


def test_device_files_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    facts = accelerators.card_facts(subject(), tmp_path)
    assert facts.devices == 2
    assert facts.torch is not None
    assert (facts.torch_cuda is None) == ("+cpu" in facts.torch)


# ---- directories, limits


def test_a_temporary_directory_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("job1234567890" * 5)
    long.mkdir()
    finding = only(machine.examine_machine(subject({"TMPDIR": str(long)})), "temporary")
    assert finding.level == "warning"
    assert f"TMPDIR={long} is too long" in finding.says
    assert "/tmp is used" in finding.says
    finding = only(machine.examine_machine(subject({"RAY_TMPDIR": str(long)})), "temporary")
    assert finding.level == "error"
    assert "RAY_TMPDIR" in finding.says
    assert only(machine.examine_machine(subject({"RAY_TMPDIR": "/tmp"})), "temporary").level == "ok"


def test_a_home_and_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    found = machine.examine_machine(subject(cache_dir="/proc/nobody/.cache"))
    assert only(found, "home").level == "warning"
    assert "/proc/nobody cannot be written" in only(found, "home").says
    assert only(found, "cache").level == "warning"
    assert f"moe-ray-{os.getuid()} is used" in only(found, "cache").says
    found = machine.examine_machine(subject({"RAY_AUTH_TOKEN": "secret"}, cache_dir="/proc/nobody/.cache"))
    assert only(found, "home").level == "ok"
    assert "secret" not in str(found)
    nowhere = replace(machine.machine_facts(subject()), home_writable=False, cache_writable=False, cache_instead=None)
    assert only(machine.check_home(nowhere), "home").level == "error"
    assert only(machine.check_cache(nowhere), "cache").level == "error"


def test_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        finding = only(machine.examine_machine(subject()), "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.level == "error"
    assert "at most 512" in finding.says
    few = replace(machine.machine_facts(subject()), files=(4096, 4096))
    assert only(machine.check_open_files(few), "open files").level == "warning"


def test_the_control_groups_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit(tmp_path, tmp_path) is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert machine.memory_limit(tmp_path, tmp_path) == 2**31
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.memory_limit(tmp_path, tmp_path) is None
    limited = replace(machine.machine_facts(subject()), memory=2**35, memory_limit=2**31)
    assert only(machine.check_memory(limited), "memory").says == "2.0 GiB by the control group, of 32.0 GiB"


def test_small_shared_memory_and_full_disks() -> None:
    facts = machine.machine_facts(subject())
    small = replace(facts, shm_writable=True, shm_free=64 * 2**20)
    assert "64 MiB free" in only(machine.check_shared_memory(small), "shared memory").says
    assert only(machine.check_shared_memory(replace(facts, shm_writable=False)), "shared memory").level == "warning"
    full = replace(facts, disks=((Path("/data"), 30 * 2**30, 1000 * 2**30),))
    assert only(machine.check_disks(full), "disk").says == "30.0 GiB of 1,000.0 GiB free at /data"


# ---- ports, proxies, Hub, clock


def test_a_port_that_is_taken() -> None:
    with hub(404, time.time()) as url:
        port = int(url.rpartition(":")[2])
        (finding,) = (each for each in ports.examine_ports(subject(port=port)) if each.level == "error")
        assert f"{port} (HTTP) is taken by" in finding.says
        assert f"pid {os.getpid()}" in finding.says
    assert not [each for each in ports.examine_ports(subject(port=port)) if each.level == "error"]


def test_our_own_server_takes_its_port() -> None:
    ours = ports.PortFacts(8000, "HTTP", True, False, "a moe_ray server", True)
    (finding,) = ports.check_ports([ours, ports.PortFacts(8265, "x", False, False)])
    assert (finding.level, finding.says) == ("warning", "8265 (x) is taken")


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert only(network.check_proxies(network.proxy_facts()), "proxies").says == "none"
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    finding = only(network.check_proxies(network.proxy_facts()), "proxies")
    assert finding.level == "warning"
    assert "127.0.0.1 and localhost" in finding.says
    assert "secret" not in str(finding)
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1,::1")
    assert only(network.check_proxies(network.proxy_facts()), "proxies").level == "ok"
    monkeypatch.setenv("https_proxy", "proxy.example.org:3128")
    assert "https_proxy is no URL" in only(network.check_proxies(network.proxy_facts()), "proxies").says


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with hub(401, time.time() - 3600) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        facts = network.hub_facts()
        finding = only(network.check_hub(facts), "hub")
        assert (finding.level, "refuses the token" in finding.says) == ("error", True)
        clock = only(network.check_clock(network.clock_facts(facts, 1)), "clock")
        assert clock.level == "warning"
        assert clock.says.startswith("3,60")
        assert "ahead of the Hub's" in clock.says
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        assert only(network.check_hub(network.hub_facts()), "hub").level == "ok"
    with hub(200, time.time()) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        facts = network.hub_facts()
        assert only(network.check_hub(facts), "hub").level == "ok"
        assert only(network.check_clock(network.clock_facts(facts, 1)), "clock").level == "ok"
    assert only(network.check_hub(network.hub_facts()), "hub").level == "warning", "it is gone"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in only(network.check_hub(network.hub_facts()), "hub").says


# ---- all of it, as a user types it


def test_the_command_tells_all_faults_at_once(tmp_path: Path) -> None:
    long = tmp_path / ("job1234567890" * 5)
    long.mkdir()
    gone = f"127.0.0.1:{free_port()}"
    with hub(404, time.time()) as url:
        port = int(url.rpartition(":")[2])
        env = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "TMPDIR": str(long),
            "RAY_TMPDIR": "",
            "HOME": "/proc/nobody",
            "MOE_RAY_CACHE_DIR": "/proc/nobody/.cache",
            "MOE_RAY_ENGINE__MAX_NUM_SEQS": "many",
            "RAY_ADDRESS": gone,
            "http_proxy": "http://127.0.0.1:9",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", RUN, "doctor", "--port", str(port), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    errors = {check for check, each in found.items() if each["level"] == "error"}
    assert errors == {"configuration", "ports", "ray address"}
    assert {"temporary", "home", "proxies"} <= {check for check, each in found.items() if each["level"] == "warning"}
    assert "max_num_seqs" in found["configuration"]["says"]
    assert f"no Ray cluster at {gone}: nothing listens there" in found["ray address"]["says"]
    assert found["ray address"]["mend"] == "unset RAY_ADDRESS"
    assert all("\n" not in each["says"] + each["mend"] for each in found.values())
    assert all(each["mend"] for each in found.values() if each["level"] != "ok")
