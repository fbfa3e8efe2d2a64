"""The question of `helm test`, asked of a server that is not ready at first."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from helm_rendering import render


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
    """The script of `helm test`; `test_deployed` lets it ask a real server."""
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
