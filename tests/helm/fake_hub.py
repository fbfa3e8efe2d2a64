"""A Hugging Face Hub of one repository, and the chart's scripts that talk to it."""

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

from helm_rendering import CHART

MAIN, OTHER = "0" * 40, "1" * 40
WANTED = "owner/mixtral@main"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CHART / "files" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as downloading one repository asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    info_works: ClassVar[bool] = True
    tree_works: ClassVar[bool] = True
    slow: ClassVar[threading.Event | None] = None

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        name = self.path.split("?")[0].rpartition("/")[2]
        content = b""
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": f, "size": len(d), "oid": "1" * 40} for f, d in self.files.items()]
            content = json.dumps(tree).encode() if self.tree_works else b""
        elif self.path.startswith("/api/models/"):
            sizes = "blobs=" in self.path
            siblings = [{"rfilename": f, **({"size": len(d)} if sizes else {})} for f, d in self.files.items()]
            info = {"id": "owner/mixtral", "sha": OTHER if "v2" in self.path else MAIN, "siblings": siblings}
            content = json.dumps(info).encode() if self.info_works else b""
        elif name in self.files:
            content = self.files[name]
        self.send_response(200 if content else 403)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{name}-1"')
        self.send_header("X-Repo-Commit", MAIN)
        self.end_headers()
        if body and self.slow is not None and name == "model.safetensors":
            self.wfile.write(content[: len(content) // 2])
            self.slow.wait(30)
            content = content[len(content) // 2 :]
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def environment(hub: str, tmp_path: Path, **changes: str) -> dict[str, str]:
    given = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "REPO": "owner/mixtral",
        "REVISION": "",
        "DIRECTORY": str(tmp_path / "mixtral"),
        "WANTED": WANTED,
    }
    return {**os.environ, **given, **changes}


def download(hub: str, tmp_path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The Job's script: the real client against a server that speaks the Hub's protocol."""
    return subprocess.run(
        [sys.executable, "-u", CHART / "files" / "download.py"],
        env=environment(hub, tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
