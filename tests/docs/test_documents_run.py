"""The Python and curl blocks of the documents, run against a server as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, blocks, name_of
from served import Served

WRITTEN = "http://127.0.0.1:8000"


def found(language: str, having: str) -> list[tuple[str, str]]:
    """(page, block) of the blocks that have some text in them."""
    return [(name_of(page), block) for page in PAGES for block in blocks(page, language) if having in block]


def cases(blocks_found: list[tuple[str, str]]) -> list[object]:
    return [pytest.param(block, id=f"{page}-{number}") for number, (page, block) in enumerate(blocks_found)]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", cases(found("python", "OpenAI")))
def test_python_that_asks_a_server(block: str, served_demo: Served, tmp_path: Path) -> None:
    assert WRITTEN in block
    assert run(sys.executable, "-c", block.replace(WRITTEN, served_demo.url), cwd=tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("block", cases(found("python", "LLM")))
def test_python_without_a_server(block: str, demo_model: Path, tmp_path: Path) -> None:
    assert "Paris" in run(sys.executable, "-c", block, cwd=tmp_path)


@pytest.mark.parametrize("block", cases(found("bash", "curl http")))
def test_curl(block: str, served_demo: Served, tmp_path: Path) -> None:
    assert WRITTEN in block
    assert "Paris" in run("bash", "-euc", block.replace(WRITTEN, served_demo.url), cwd=tmp_path)


def test_every_python_block_is_run() -> None:
    assert len(found("python", "")) == len(found("python", "OpenAI")) + len(found("python", "LLM")) > 2
    assert found("bash", "curl http")
