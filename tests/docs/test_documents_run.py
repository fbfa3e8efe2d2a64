"""The Python and curl blocks of the documents, run against a server as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, blocks, name_of
from served import Served

WRITTEN = re.compile(r"http://127\.0\.0\.1:(8000|3000)")
"""Where `moe-ray serve` listens, and where TGI's launcher does."""
CLIENTS = ("OpenAI", "InferenceClient")


def found(language: str, *having: str) -> list[tuple[str, str]]:
    """(page, block) of the blocks that have one of some texts in them."""
    every = [(name_of(page), block) for page in PAGES for block in blocks(page, language)]
    return [(name, block) for name, block in every if any(text in block for text in having)]


def cases(blocks_found: list[tuple[str, str]]) -> list[object]:
    return [pytest.param(block, id=f"{page}-{number}") for number, (page, block) in enumerate(blocks_found)]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", cases(found("python", *CLIENTS)))
def test_python_that_asks_a_server(block: str, served_demo: Served, tmp_path: Path) -> None:
    assert WRITTEN.search(block)
    assert run(sys.executable, "-c", WRITTEN.sub(served_demo.url, block), cwd=tmp_path).strip()


@pytest.mark.slow
@pytest.mark.parametrize("block", cases(found("python", "LLM")))
def test_python_without_a_server(block: str, demo_model: Path, tmp_path: Path) -> None:
    assert "Paris" in run(sys.executable, "-c", block, cwd=tmp_path)


@pytest.mark.parametrize("block", cases(found("bash", "curl http")))
def test_curl(block: str, served_demo: Served, tmp_path: Path) -> None:
    assert WRITTEN.search(block)
    assert "Paris" in run("bash", "-euc", WRITTEN.sub(served_demo.url, block), cwd=tmp_path)


def test_every_python_block_is_run() -> None:
    assert len(found("python", "")) == len(found("python", *CLIENTS)) + len(found("python", "LLM")) > 2
    assert found("bash", "curl http")
