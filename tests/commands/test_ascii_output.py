"""Every verb's output on streams that are ASCII: no character ends a command."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moe_ray.console import loading_bars, shows_unicode

RUN = "from moe_ray.commands.main import main; main()"
ASCII = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "COLUMNS": "100"}


def moe_ray(*arguments: str, stdin: bytes = b"", **more: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, **ASCII, **more}
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], input=stdin, capture_output=True, timeout=120, env=env, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, random_model: Path, demo_model: Path) -> Path:
    """A checkpoint in a directory whose name is not ASCII."""
    directory = tmp_path_factory.mktemp("models") / "Café-χ"
    shutil.copytree(random_model, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, directory)
    return directory


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"{verb} --help".strip() for verb in ("", "serve", "chat", "generate", "plan", "status", "scale")),
        *("convert upcycle --help", "bench serve --help", "version"),
    ],
)
def test_help(arguments: str) -> None:
    done = moe_ray(*arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"Error" not in done.stderr


def test_plan_and_errors_name_what_is_not_ascii(model: Path) -> None:
    done = moe_ray("plan", "--model", str(model), "--gpu-memory", "16")
    assert done.returncode == 0, done.stderr
    assert b"Caf\\xe9-\\u03c7" in done.stdout
    wrong = moe_ray("plan", "--model", "/no/Café")
    assert wrong.returncode == 1
    assert b"error: model '/no/Caf\\xe9'" in wrong.stderr
    assert b"Traceback" not in wrong.stderr


def test_generate_reads_and_writes_any_text(model: Path) -> None:
    done = moe_ray("generate", "-", "--model", str(model), "--max-tokens", "8", stdin="Où est-il ? \xff".encode())
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.isascii()


def test_status_and_chat_say_what_is_wrong() -> None:
    for arguments in (["status", "--address", "127.0.0.1:1"], ["chat", "--url", "http://127.0.0.1:1"]):
        done = moe_ray(*arguments)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"error: ")
        assert b"Traceback" not in done.stderr


def test_bars_on_a_stream_that_is_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    assert not shows_unicode(stream)
    with loading_bars(Console(file=stream, width=100, force_terminal=True)) as report:
        report("Expert0", 1, 2)
        report("Expert0", 2, 2)
    stream.flush()
    assert b"Expert0" in raw.getvalue()


def test_a_reader_that_goes_ends_a_command_quietly(model: Path) -> None:
    command = f"exec {sys.executable} -c '{RUN}' plan --json --model '{model}'"
    done = subprocess.run(["bash", "-c", f"({command}) | true"], capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in done.stderr


def test_json_is_ascii_anyway(model: Path) -> None:
    done = moe_ray("plan", "--model", str(model), "--json")
    assert json.loads(done.stdout)["model"] == "Café-χ"
