"""The image: pinned, without root, small at the end; its scripts do what they say, and the kernels are built ahead."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ahead_cases import SMALL
from cluster_files import BIN, CLUSTER, ROOT, module, shell, tool

from moe_ray.bench.free_port import free_port
from moe_ray.errors import KernelsUnavailable
from moe_ray.native import build

DOCKERFILE = CLUSTER / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    return [
        (words[0], words[1] if len(words) > 1 else "")
        for line in re.sub(r"\\\n", " ", text).splitlines()
        if (words := line.split(maxsplit=1))
    ]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage → its instructions, the FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in instructions():
        if keyword == "FROM":
            current = found.setdefault(rest.split(" AS ")[1], [])
        if found:
            current.append((keyword, rest))
    return found


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for keyword, rest in instructions() if keyword == "ARG")


def test_hadolint_finds_nothing() -> None:
    linted = shell(BIN / "hadolint", DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_base_images_and_torch_are_pinned_as_in_pyproject() -> None:
    bases = {name: rest.split(" AS ")[0] for name, ((_, rest), *_) in stages().items()}
    assert bases["moe-ray"] == bases["tools"] == "python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE}"
    assert bases["build"] == "torch-${VARIANT}"
    assert {"torch-cpu", "torch-cuda"} <= bases.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    defaults = arguments()
    assert re.fullmatch(r"3\.11\.\d+", defaults["PYTHON_VERSION"])
    assert f"torch=={defaults['TORCH_VERSION']}" in project["dependencies"]
    assert defaults["VERSION"] == project["version"]


def test_what_runs_is_user_1000_and_has_a_compiler_for_triton_alone() -> None:
    last, steps = list(stages().items())[-1]
    assert last == "moe-ray", "docker build without --target makes it"
    done = [keyword for keyword, _ in steps]
    assert [rest for keyword, rest in steps if keyword == "USER"] == ["1000:1000"]
    assert not {"RUN", "COPY", "ADD"} & set(done[done.index("USER") :]), "nothing is written after"
    installed = " ".join(rest for keyword, rest in steps if keyword == "RUN")
    assert "g++" not in installed
    for_cards = '&& if [[ "${VARIANT}" == cuda ]]; then apt-get install -y --no-install-recommends gcc libc6-dev; fi'
    assert for_cards in installed
    assert installed.count("gcc") == 1
    for needed in ("bash", "wget", "curl", "tini", "procps"):
        assert needed in shlex.split(installed)
    assert "HEALTHCHECK" in done
    entry = next(rest for keyword, rest in steps if keyword == "ENTRYPOINT")
    assert entry == '["tini", "--", "moe-ray-entrypoint"]', "with -g Ray has the signal too, and is gone before moe-ray"


@pytest.mark.parametrize(
    ("variant", "index", "cuda", "says"),
    [
        ("cpu", "", None, ""),
        ("cpu", "", "13.0", "this torch has CUDA 13.0, the image is to have none"),
        ("cuda", "https://pypi.org/simple", "13.0", ""),
        ("cuda", "https://pypi.org/simple", None, "this torch has no CUDA"),
        ("cuda", "https://download.pytorch.org/whl/cu126", "12.6", ""),
        ("cuda", "https://download.pytorch.org/whl/cu130/", "13.0", ""),
        ("cuda", "https://download.pytorch.org/whl/cu128", "13.0", "none of this version for CUDA 12.8"),
    ],
)
def test_a_torch_that_pip_took_from_elsewhere_is_refused(
    variant: str, index: str, cuda: str | None, says: str, tmp_path: Path
) -> None:
    checker = CLUSTER / "docker" / "check_torch.py"
    complaint = module(checker).complaint(variant, index, cuda)
    assert says in complaint
    assert bool(says) == bool(complaint)
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {cuda!r}\n")
    ran = shell(sys.executable, checker, variant, index, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert ran.returncode == bool(says)
    assert says in ran.stderr


@pytest.mark.parametrize(("stage", "check"), [("torch-cpu", "cpu"), ("torch-cuda", 'cuda "${TORCH_CUDA_INDEX}"')])
def test_each_variant_checks_the_torch_that_it_got(stage: str, check: str) -> None:
    (install,) = [rest for keyword, rest in stages()[stage] if keyword == "RUN"]
    assert install.endswith(f"&& /opt/moe-ray/bin/python /tmp/check_torch.py {check}")
    assert ("COPY", "cluster/docker/check_torch.py /tmp/check_torch.py") in stages()["tools"]


def test_secrets_and_caches_stay_out_of_the_context() -> None:
    """.dockerignore lets in only what is copied, and what is copied is there."""
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for keyword, rest in instructions()
        if keyword == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    }
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source.removeprefix("./") == each or source.startswith(f"{each}/") for each in let_in), source


@pytest.mark.slow
def test_native_libraries_are_built_for_machines_unlike_this_one(tmp_path: Path) -> None:
    """And are the very files that moe_ray would otherwise build on first use. Compiled fast, not for speed."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    quickly = (
        "from moe_ray.native import build\n"
        "build.COMMON = tuple('-O0' if flag == '-O3' else flag for flag in build.COMMON)\n"
    )
    script = (
        f"{quickly}import runpy, sys\nsys.argv[0] = 'prebuild.py'\n"
        f"runpy.run_path({str(CLUSTER / 'docker' / 'prebuild.py')!r}, run_name='__main__')"
    )
    built = shell(sys.executable, "-c", script, tmp_path, timeout=600)
    assert built.returncode == 0, built.stderr
    files = [Path(line) for line in built.stdout.split()]
    assert {file.name.rsplit("-", 1)[0] for file in files} >= {"kernels-avx2", "kernels-avx512_bf16", "host", "links"}
    assert sorted((tmp_path / "native").iterdir()) == files, "no lock and no part is left"
    script = (
        f"{quickly}import sys; from pathlib import Path\n"
        "build._compile = lambda *_: sys.exit('built again')\n"
        "[build.shared_library(library, Path(sys.argv[1])) for library in build.libraries()]"
    )
    again = shell(sys.executable, "-c", script, tmp_path)
    assert again.returncode == 0, again.stderr


def prebuilt_elsewhere(directory: Path, machine: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What prebuild.py does on a machine of this architecture."""
    script = (
        "import platform, runpy, sys\n"
        f"platform.machine = lambda: {machine!r}\n"
        "sys.argv[0] = 'prebuild.py'\n"
        f"runpy.run_path({str(CLUSTER / 'docker' / 'prebuild.py')!r}, run_name='__main__')"
    )
    return shell(sys.executable, "-c", script, directory, env={**os.environ, **environment})


def test_kernels_of_another_architecture_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(KernelsUnavailable, match="kernels-avx2 exist for Linux on x86_64, this is linux on aarch64"):
        build.shared_library(build.KERNELS["avx2"], tmp_path)


def test_an_image_for_another_architecture_has_no_native_library(tmp_path: Path) -> None:
    ran = prebuilt_elsewhere(tmp_path, "riscv64")
    assert (ran.returncode, ran.stdout.strip()) == (0, "")
    assert ran.stderr == "no native libraries for linux on riscv64\n"


def test_an_image_whose_libraries_do_not_compile_is_not_built(tmp_path: Path) -> None:
    broken = tool(tmp_path / "c++", "echo 'x.cpp:1: error: broken' >&2; exit 1")
    ran = prebuilt_elsewhere(tmp_path / "cache", "x86_64", CXX=str(broken))
    assert ran.returncode == 1
    assert "could not build them: x.cpp:1: error: broken" in ran.stderr


def test_the_entrypoint_fills_the_cache_and_becomes_the_command(tmp_path: Path) -> None:
    prebuilt, cache = tmp_path / "prebuilt", tmp_path / "cache"
    prebuilt.mkdir()
    (prebuilt / "links-1.so").write_text("new")
    (prebuilt / "kernels-2.so").write_text("new")
    (cache / "moe-ray" / "native").mkdir(parents=True)
    (cache / "moe-ray" / "native" / "links-1.so").write_text("its own")
    environment = {**os.environ, "MOE_RAY_PREBUILT": str(prebuilt), "XDG_CACHE_HOME": str(cache)}
    environment.pop("MOE_RAY_CACHE_DIR", None)
    entrypoint = CLUSTER / "docker" / "entrypoint.sh"
    said = shell(entrypoint, "bash", "-c", 'echo "$0 $$"; exit 3', "a b", env=environment)
    assert said.returncode == 3
    assert said.stdout.startswith("a b ")
    assert {file.name: file.read_text() for file in (cache / "moe-ray" / "native").iterdir()} == {
        "links-1.so": "its own",
        "kernels-2.so": "new",
    }
    environment["XDG_CACHE_HOME"] = "/proc/no-such"  # nowhere to write: it goes on all the same
    assert shell(entrypoint, "true", env=environment).returncode == 0


def test_the_cuda_image_has_kernels_for_the_cards_that_are_asked_for() -> None:
    steps = stages()["build"]
    (compiled,) = [rest for keyword, rest in steps if keyword == "RUN" and "prebuild_triton" in rest]
    assert compiled == (
        'if [ "${VARIANT}" = cuda ]; then /opt/moe-ray/bin/python /tmp/prebuild_triton.py /opt/moe-ray/triton '
        '"${CUDA_CAPABILITIES}"; fi'
    )
    assert ("ARG", "VARIANT=cpu") in steps, "an argument before the first FROM is known to no stage"
    assert arguments()["CUDA_CAPABILITIES"] == '"80 86 89 90 100 120"'


@pytest.mark.parametrize("words", ["75", "8.6", "90 sm_86"])
def test_a_capability_without_kernels_is_refused(words: str, tmp_path: Path) -> None:
    ran = shell(sys.executable, CLUSTER / "docker" / "prebuild_triton.py", tmp_path / "triton", words)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: not a compute capability from 80 on: ")
    assert not (tmp_path / "triton").exists()


@pytest.mark.slow
def test_kernels_of_the_image_are_found_where_the_entrypoint_puts_them(tmp_path: Path) -> None:
    """By the very path that launches them, with a driver that says which card there is."""
    prebuilt, cache, config = tmp_path / "prebuilt", tmp_path / "cache" / "triton", tmp_path / "config.json"
    config.write_text(json.dumps({**SMALL, "model_type": "mixtral"}))
    script = CLUSTER / "docker" / "prebuild_triton.py"
    built = shell(sys.executable, script, prebuilt, "86", "--config", config, timeout=600)
    assert built.returncode == 0, built.stderr
    assert re.fullmatch(r"compute capability 8\.6: \d+ kernels compiled, \d+ were there\n", built.stdout)
    environment = {**os.environ, "MOE_RAY_PREBUILT_TRITON": str(prebuilt), "TRITON_CACHE_DIR": str(cache)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    entrypoint = CLUSTER / "docker" / "entrypoint.sh"
    for case in ({}, {"quantize": "int4", "cache": "int8"}):
        launch = f"import ahead_of_start; ahead_of_start.launch_all({case}, 86)"
        ran = shell(entrypoint, sys.executable, "-c", launch, env=environment, timeout=600)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["made"] == 0
        assert json.loads(ran.stdout)["found"] > 10


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on loopback that answers everything with `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_container_is_as_healthy_as_its_server(status: int, code: int) -> None:
    if shutil.which("wget") is None:
        pytest.skip("no wget here (the image has it)")
    with answering(status) as port:
        environment = {**os.environ, "MOE_RAY_PORT": str(port), "no_proxy": "127.0.0.1"}
        assert shell(CLUSTER / "docker" / "healthcheck.sh", env=environment).returncode == code


@pytest.mark.parametrize(
    ("processes", "needs_http", "code"),
    [
        (["/opt/moe-ray/raylet/raylet"], "", 0),
        ([], "", 1),
        (["/opt/moe-ray/raylet/raylet"], "1", 1),
        # The image's own command: its server has to answer, though Ray runs.
        (["/opt/moe-ray/raylet/raylet", "python /opt/moe-ray/bin/moe-ray serve --host 0.0.0.0"], "", 1),
    ],
)
def test_without_a_server_only_a_node_of_a_cluster_is_healthy(
    processes: list[str], needs_http: str, code: int, tmp_path: Path
) -> None:
    """pgrep of this test looks at the processes of a container that is not there."""
    (tmp_path / "processes").write_text("".join(f"{line}\n" for line in processes))
    tool(
        tmp_path / "bin" / "pgrep",
        'case $1 in -f) grep -e "$2" "$PROCESSES";; -x) grep -e "/$2\\$" "$PROCESSES";; *) exit 2;; esac',
    )
    port = free_port()
    environment = {**os.environ, "MOE_RAY_PORT": str(port), "MOE_RAY_HEALTH_NEEDS_HTTP": needs_http}
    environment |= {"PROCESSES": str(tmp_path / "processes"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert shell(CLUSTER / "docker" / "healthcheck.sh", env=environment).returncode == code
