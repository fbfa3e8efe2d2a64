"""What runs in pods besides Ray: waiting for the model, downloading it, and the question of `helm test`."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from helm_rendering import CHART, render


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CHART / "files" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_waiting_for_the_model(tmp_path: Path) -> None:
    missing = script("wait_for_model").missing
    model = tmp_path / "mixtral"
    assert missing(model, False).endswith("no such directory")
    model.mkdir()
    assert "config.json: not there" in missing(model, False)
    (model / "config.json").write_text("{}")
    assert "no *.safetensors" in missing(model, False)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-1.safetensors").touch()
    assert "1 of 2 weight files missing, the first model-2.safetensors" in missing(model, False)
    (model / "model-2.safetensors").touch()
    assert missing(model, False) == ""
    assert "the download has not finished" in missing(model, True)
    (model / script("download").MARK).touch()
    assert missing(model, True) == ""


def test_waiting_ends_with_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, CHART / "files" / "wait_for_model.py"],
        env={"MODEL": str(tmp_path / "absent"), "TIMEOUT_S": "0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "gave up: " in done.stderr
    assert "no such directory" in done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as downloading one repository asks for."""

    files: ClassVar = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "training.bin": b"unwanted"}
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": file} for file in self.files]
            tree = [{"type": "file", "path": f, "size": len(d), "oid": "1" * 40} for f, d in self.files.items()]
            info = {"id": "owner/mixtral", "sha": self.commit, "siblings": siblings}
            content = json.dumps(tree if "/tree/" in self.path else info).encode()
        elif name in self.files:
            content = self.files[name]
        else:
            content = b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{name}-1"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_downloading_a_model(tmp_path: Path) -> None:
    """The real client against a server that speaks the Hub's protocol."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    directory = tmp_path / "mixtral"
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "REPO": "owner/mixtral",
        "REVISION": "",
        "DIRECTORY": str(directory),
        "NO_PROXY": "127.0.0.1",
    }
    try:
        first, second = (
            subprocess.run(
                [sys.executable, "-u", CHART / "files" / "download.py"],
                env=env,
                capture_output=True,
                text=True,
                timeout=120,
            )
            for _ in range(2)
        )
    finally:
        server.shutdown()
        server.server_close()
    assert first.returncode == 0, first.stderr
    assert "downloading owner/mixtral@main" in first.stdout
    assert (directory / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]
    assert not (directory / "training.bin").exists()
    assert script("wait_for_model").missing(directory, True) == ""
    assert "already" in second.stdout


class Server(http.server.BaseHTTPRequestHandler):
    """A server that is not ready at first, wants a key, and always says the same."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer sk-first":
            status, content = 401, {"error": "who are you?"}
        elif len(self.asked) == 1:
            status, content = 503, {"error": "not ready"}
        elif self.path == "/v1/models":
            status, content = 200, {"data": [{"id": "mixtral"}]}
        elif self.path == "/v1/completions":
            status, content = 200, {"choices": [{"text": " Paris."}]}
        else:
            status, content = 200, {"choices": [{"message": {"content": "It is Paris."}}]}
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({}, 0, "mixtral: 'What is the capital of France?' → 'It is Paris.'"),
        ({"CHAT": "0"}, 0, "→ ' Paris.'"),
        ({"EXPECT": "Rome"}, 1, "the answer does not match 'Rome'"),
        ({"API_KEYS": '["wrong"]'}, 1, "/v1/models: 401"),
    ],
)
def test_asking_the_model(environment: dict[str, str], status: int, said: str) -> None:
    """The script of `helm test`; `test_serve_config` lets it ask a real server."""
    (container,) = render().one("Pod", "-test")["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    Server.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [sys.executable, *container["command"][1:]],
            env=env
            | {
                "URL": f"http://127.0.0.1:{server.server_port}",
                "API_KEYS": '["sk-first", "sk-second"]',
                "NO_PROXY": "*",
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == status
    assert said in done.stdout + done.stderr
