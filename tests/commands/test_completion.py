"""Completion in shells: a real bash, and for zsh and fish the protocol that their scripts speak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
COMPLETES = """
import sys
from moe_ray.commands.main import app
try:
    app(prog_name="moe-ray")
except SystemExit:
    pass
loaded = sorted(name for name in ("ray", "torch", "grpc", "transformers", "httpx", "numpy") if name in sys.modules)
assert not loaded, loaded
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("_TYPER", "COMP_", "_MOE_RAY"))}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", **more}


def completed(line: str, directory: Path, **more: str) -> list[str]:
    """What the process that a shell starts says, for bash; it loads nothing heavy."""
    env = environment(
        COMP_WORDS=line.replace(" ", "\n"), COMP_CWORD=str(line.count(" ")), _MOE_RAY_COMPLETE="complete_bash", **more
    )
    done = subprocess.run(
        [sys.executable, "-c", COMPLETES],
        capture_output=True,
        text=True,
        cwd=directory,
        env=env,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("mixtral/config.json", "shelf/other/config.json", "q4.gguf", "notes.txt", ".hidden/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "hub" / "models--mistralai--Mixtral-8x7B").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("moe-ray s", ["serve", "status", "scale", "support-bundle"]),
        ("moe-ray serve --quantize-trunk i", ["int8", "int4"]),
        ("moe-ray serve --model m", ["mistralai/Mixtral-8x7B", "mixtral"]),
        ("moe-ray doctor -m ", ["demo", "mistralai/Mixtral-8x7B", "hub/", "mixtral", "q4.gguf", "shelf/"]),
        ("moe-ray convert quantize shelf/", ["shelf/other"]),
        ("moe-ray chat --set top", ["top_k=", "top_p="]),
    ],
)
def test_words(line: str, expected: list[str], models: Path) -> None:
    assert completed(line, models, HF_HUB_CACHE=str(models / "hub")) == expected


def test_a_real_bash(models: Path) -> None:
    script = """
        eval "$(moe-ray --show-completion)"
        COMP_WORDS=(moe-ray serve --model mix); COMP_CWORD=3
        $(complete -p moe-ray | sed 's/.*-F \\([^ ]*\\) .*/\\1/') moe-ray
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        cwd=models,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.stdout == "mixtral\n", done.stderr


def test_installing_it_for_bash(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", "moe-ray --install-completion; true"],
        capture_output=True,
        text=True,
        env=environment(HOME=str(tmp_path)),
        timeout=60,
        check=False,
    )
    assert "bash completion installed" in done.stdout, done.stderr
    installed = tmp_path / ".bash_completions" / "moe-ray.sh"
    assert "complete_bash" in installed.read_text()
    assert str(installed) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("shell", "script", "variables", "said"),
    [
        ("zsh", "#compdef moe-ray", {"_TYPER_COMPLETE_ARGS": "moe-ray ps"}, '"ps":'),
        (
            "fish",
            "complete --command moe-ray",
            {"_TYPER_COMPLETE_ARGS": "moe-ray p", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            "ps\t",
        ),
    ],
)
def test_zsh_and_fish(shell: str, script: str, variables: dict[str, str], said: str) -> None:
    def run(instruction: str, **more: str) -> str:
        env = environment(_MOE_RAY_COMPLETE=f"{instruction}_{shell}", **more)
        done = subprocess.run([BIN / "moe-ray"], capture_output=True, text=True, env=env, timeout=60, check=False)
        return done.stdout

    assert run("source").lstrip().startswith(script)
    assert said in run("complete", **variables)
