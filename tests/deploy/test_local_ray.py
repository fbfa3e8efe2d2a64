"""Before `ray.init`: what a Ray of our own is told, which addresses are refused at once, and errors in one line."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_ray.bench.free_port import free_port
from moe_ray.deploy import local_ray
from moe_ray.deploy.local_ray import join, prepare_local_ray, reason, unreachable
from moe_ray.errors import NotReady

NOWHERE = "/dev/null/nowhere"


def test_what_the_user_has_set_stays() -> None:
    environ = {"RAY_worker_niceness": "7", "RAY_TMPDIR": "/var/tmp", "RAY_AUTH_MODE": "disabled"}
    prepare_local_ray(environ)
    assert environ["RAY_worker_niceness"] == "7"
    assert environ["RAY_TMPDIR"] == "/var/tmp"
    assert environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert "RAY_AUTH_TOKEN_PATH" not in environ


def test_a_long_temporary_directory_is_passed_by(tmp_path: Path) -> None:
    long = tmp_path / ("job1234567890" * 5)
    long.mkdir()
    environ = {"TMPDIR": str(long)}
    prepare_local_ray(environ)
    assert environ["RAY_TMPDIR"] == environ["TMPDIR"] == "/tmp", "Python's own processes have sockets, too"
    given = {"TMPDIR": str(long), "RAY_TMPDIR": "/var/tmp"}
    prepare_local_ray(given)
    assert given == {**given, "RAY_TMPDIR": "/var/tmp", "TMPDIR": "/var/tmp"}
    usual: dict[str, str] = {}
    prepare_local_ray(usual)
    assert "RAY_TMPDIR" not in usual, "Ray's own choice serves"


def test_without_a_home_the_token_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", NOWHERE)
    environ: dict[str, str] = {}
    prepare_local_ray(environ)
    path = Path(environ["RAY_AUTH_TOKEN_PATH"])
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    again: dict[str, str] = {}
    prepare_local_ray(again)
    assert (again["RAY_AUTH_TOKEN_PATH"], path.read_text()) == (str(path), token)
    given = {"RAY_AUTH_TOKEN": "x"}
    prepare_local_ray(given)
    assert "RAY_AUTH_TOKEN_PATH" not in given
    found: dict[str, str] = {}
    local_ray._find_own_token(found)
    assert found == {"RAY_AUTH_TOKEN_PATH": str(path)}, "status and scale of the same user find it"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "expected host:port"),
        ("127.0.0.1", "expected host:port"),
        ("127.0.0.1:ray", "'ray' is no port"),
        ("127.0.0.1:99999", "nothing listens there"),
        ("no-such-host.invalid:6379", "nothing listens there"),
    ],
)
def test_addresses_that_cannot_be(address: str, said: str) -> None:
    assert said in (unreachable(address) or "")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens(scheme: str) -> None:
    began = time.monotonic()
    with pytest.raises(NotReady, match=rf"^no Ray cluster at '{scheme}127.0.0.1:\d+': nothing listens there .*refused"):
        join(f"{scheme}127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 5


def test_a_stale_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(NotReady, match=r"no Ray cluster at '127\.0\.0\.1:1' \(\$RAY_ADDRESS\): nothing listens there"):
        join("auto")


def test_a_port_that_is_another_program_s() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert unreachable(f"127.0.0.1:{server.server_port}", 1.0) == "something else than Ray listens there"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_errors_are_one_line() -> None:
    assert reason(RuntimeError("\n  Ray said no.\nmore\n")) == "Ray said no."
    assert reason(OSError(13, "Permission denied", "/x")) == "PermissionError: [Errno 13] Permission denied: '/x'"
    assert reason(AssertionError()) == "AssertionError"
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: it is so\n'
    assert reason(RuntimeError(traceback)) == "ValueError: it is so"


LATE = """
import psutil, ray
from moe_ray.deploy.local_ray import prepare_local_ray, start
prepare_local_ray()
import ray._private.services as services

asked, get_node = [], services.get_node

def late_once(*arguments):
    asked.append(arguments)
    if len(asked) == 1:
        raise Exception("The current node timed out during startup. This could happen because ...")
    return get_node(*arguments)

services.get_node = late_once
start(include_dashboard=False, num_cpus=1)
assert ray.get(ray.remote(lambda: 42).remote()) == 42
print(sum("gcs_server" in each.name() for each in psutil.Process().children()))
"""


@pytest.mark.slow
def test_a_ray_that_is_late_is_started_once_more() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "It is started once more" in done.stderr
    assert done.stdout.split() == ["1"], "nothing is left of the first"
