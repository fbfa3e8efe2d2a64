"""What `--model owner/name` brings down, against a server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from gguf_files import write_gguf

from moe_ray.config import load_config
from moe_ray.errors import CheckpointError
from moe_ray.hub import resolve_config, resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.repo_files import small_files, weight_files

COMMIT = "0" * 40
WEIGHTS = b"weights" * 1000


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, and what was fetched of it."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        content = b""
        if "/tree/" in path:
            listed = [{"type": "file", "path": f, "size": len(d), "oid": "1" * 40} for f, d in self.files.items()]
            content = json.dumps(listed).encode()
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "owner/mixtral", "sha": COMMIT, "siblings": siblings}).encode()
        elif "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            content = self.files.get(name, b"")
            if body:
                self.fetched.append(name)
        self.send_response(200 if content else 404)
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which the Hub is this test's own."""
    Hub.files = {}
    Hub.fetched.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def resolve(
    environment: dict[str, str], name: str = "owner/mixtral", by: str = "resolve_model"
) -> subprocess.CompletedProcess[str]:
    """`resolve_model` in a process of its own: the Hub's client reads its environment once."""
    code = (
        "import sys\nfrom moe_ray.config import load_config\nfrom moe_ray.errors import CheckpointError\n"
        f"from moe_ray.hub import {by}\n"
        f"try: print({by}(load_config(flags={{'model': {{'path': sys.argv[1]}}}})))\n"
        "except CheckpointError as error: sys.exit(str(error))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_only_what_is_read_comes_down(hub: dict[str, str]) -> None:
    wanted = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS, "tekken.json": b"{}"}
    Hub.files = {
        **wanted,
        "consolidated.safetensors": WEIGHTS,
        "model.fp16.safetensors": WEIGHTS,
        "original/consolidated-00001-of-00001.safetensors": WEIGHTS,
        "original/config.json": b"{}",
        "onnx/config.json": b"{}",
        "mixtral.Q4_K_M.gguf": WEIGHTS,
        "pytorch_model.bin": WEIGHTS,
        "README.md": b"text",
    }
    done = resolve(hub)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert {path.name for path in directory.rglob("*")} == set(wanted) == set(Hub.fetched)
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    Hub.fetched.clear()
    assert resolve(hub).stdout == done.stdout
    assert Hub.fetched == []
    offline = resolve({**hub, "HF_HUB_OFFLINE": "1"})
    assert offline.stdout == done.stdout, offline.stderr


def test_a_plan_fetches_config_json_alone(hub: dict[str, str]) -> None:
    Hub.files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
    done = resolve(hub, by="resolve_config")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert (path.name, path.read_bytes(), Hub.fetched) == ("config.json", b"{}", ["config.json"])
    offline = {**hub, "HF_HUB_OFFLINE": "1"}
    assert resolve(offline, by="resolve_config").stdout == done.stdout
    assert resolve(hub).returncode == 0
    with_weights = resolve(offline, by="resolve_config")
    assert Path(with_weights.stdout.strip()) == path.parent, "all weights are here: their headers can be read"


def test_a_plan_without_a_config_json_says_why(hub: dict[str, str]) -> None:
    Hub.files = {"README.md": b"text"}
    assert "model 'owner/mixtral': the repository has no config.json" in resolve(hub, by="resolve_config").stderr
    offline = resolve({**hub, "HF_HUB_OFFLINE": "1"}, by="resolve_config")
    assert "its config.json is not in the local cache, and the Hub cannot be reached: give --model" in offline.stderr


def test_a_plan_takes_a_file_or_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "mixtral-8x7b.json"
    file.write_text("{}")
    for path, found in ((file, file), (tmp_path, tmp_path)):
        assert resolve_config(load_config(flags={"model": {"path": str(path)}})) == found.resolve()
    with pytest.raises(CheckpointError, match="neither a directory"):
        resolve_config(load_config(flags={"model": {"path": str(tmp_path / "absent" / "config.json")}}))


def test_the_index_says_which_weights_are_read(hub: dict[str, str]) -> None:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors", "c": "../x.safetensors"}}
    Hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1-of-2.safetensors": WEIGHTS,
        "model-2-of-2.safetensors": WEIGHTS,
        "model-3-of-2.safetensors": WEIGHTS,
        "model.safetensors": WEIGHTS,
    }
    assert resolve(hub).returncode == 0
    weights = sorted(name for name in Hub.fetched if name.endswith(".safetensors"))
    assert weights == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_as_auto_gptq_names_them(hub: dict[str, str], sharded: bool) -> None:
    name = "gptq_model-4bit-128g.safetensors"
    Hub.files = {"config.json": b"{}", "quantize_config.json": b"{}", name: WEIGHTS, "gptq_model.bin": WEIGHTS}
    if sharded:
        Hub.files |= {f"{name}.index.json": json.dumps({"weight_map": {"a": "gptq-1.safetensors"}}).encode()}
        Hub.files |= {"gptq-1.safetensors": WEIGHTS}
    done = resolve(hub)
    assert done.returncode == 0, done.stderr
    weights = [fetched for fetched in Hub.fetched if not fetched.endswith(".json")]
    assert weights == (["gptq-1.safetensors"] if sharded else [name])


def test_mistrals_own_files(hub: dict[str, str]) -> None:
    """They come down where there are no others."""
    wanted = {"params.json": b"{}", "consolidated.safetensors": WEIGHTS, "tokenizer.model.v3": b"text"}
    Hub.files = {**wanted, "old/consolidated.safetensors": WEIGHTS, "consolidated.00.pth": WEIGHTS}
    done = resolve(hub)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(done.stdout.strip()).rglob("*")} == set(wanted) == set(Hub.fetched)


def test_a_gguf_file_of_a_repository(hub: dict[str, str], random_model: Path, tmp_path: Path) -> None:
    """The one that is named comes down, with all its parts, and is unpacked."""
    write_gguf(random_model, tmp_path / "m.gguf", split=700_000)
    parts = {f"Q8/{path.name}": path.read_bytes() for path in tmp_path.glob("m-*.gguf")}
    Hub.files = {"config.json": b"{}", "other.gguf": WEIGHTS, **parts}
    done = resolve({**hub, "XDG_CACHE_HOME": str(tmp_path / "cache")}, f"owner/mixtral:{min(parts)}")
    assert done.returncode == 0, done.stderr
    assert set(Hub.fetched) == set(parts)
    assert Checkpoint.open(Path(done.stdout.strip())).config.hidden_size == 64
    absent = resolve(hub, "owner/mixtral:absent.gguf")
    assert absent.returncode == 1
    assert "model 'owner/mixtral:absent.gguf': " in absent.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"README.md": b"text", "m.Q4_K_M.gguf": WEIGHTS, "m.Q8_0.gguf": WEIGHTS},
            "GGUF files; name one: owner/mixtral:m.Q4_K_M.gguf, owner/mixtral:m.Q8_0.gguf",
        ),
        ({"params.json": b"{}", "consolidated.00.pth": WEIGHTS}, "Mistral's own layout as pickles"),
        ({"config.json": b"{}", "pytorch_model.bin": WEIGHTS}, "pickle checkpoints"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}, "a LORA adapter"),
    ],
)
def test_a_repository_says_what_it_is_and_its_weights_stay_there(
    hub: dict[str, str], files: dict[str, bytes], said: str
) -> None:
    Hub.files = files
    done = resolve(hub)
    assert done.returncode == 1
    assert "model 'owner/mixtral'" in done.stderr
    assert said in done.stderr
    assert all(name.endswith(".json") for name in Hub.fetched)


def test_an_unknown_name_and_files(tmp_path: Path) -> None:
    for path, said in (("no such model", "neither a directory"), (str(tmp_path / "absent/a/b"), "neither a directory")):
        with pytest.raises(CheckpointError, match=said):
            resolve_model(load_config(flags={"model": {"path": path}}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS)
    with pytest.raises(CheckpointError, match=r"a model is a directory with .*, or a .gguf file"):
        resolve_model(load_config(flags={"model": {"path": str(file)}}))


def test_small_files_are_those_of_the_root() -> None:
    names = ["config.json", "a/config.json", "tokenizer.model.v3", "merges.txt", "README.md", "x.safetensors"]
    assert small_files(names) == ["config.json", "merges.txt", "tokenizer.model.v3"]


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "w.bin"}}'])
def test_an_index_that_cannot_be_read_brings_nothing_down(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert weight_files(tmp_path) == []
