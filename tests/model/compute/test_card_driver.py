"""What is asked of NVIDIA's driver: programs and libraries that answer as it does, and as it does when it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ray.errors import CardDriverUnavailable
from moe_ray.model.compute import card_driver

BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The nvidia-smi that is found from now on: a script to be written."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return tool


def says(tool: Path, text: str, code: int = 0) -> None:
    asked = tool.with_name("asked")
    tool.write_text(f'#!/bin/sh\necho "$@" > {asked}\nprintf \'%b\' "{text}"\nexit {code}\n')
    tool.chmod(0o755)


def test_cards_are_listed_a_line_each(answers: Path) -> None:
    says(answers, r"15360\n24576\n")
    assert card_driver.memory_of_cards() == [15360 * 2**20, 24576 * 2**20]
    asked = answers.with_name("asked").read_text()
    assert asked == "--query-gpu=memory.total --format=csv,noheader,nounits\n"
    says(answers, r"[N/A]\n24576\n", 14)
    assert card_driver.memory_of_cards() == [24576 * 2**20], "one card does not tell, and a warning ends it with 14"
    says(answers, r"580.65.06\n580.65.06\n")
    assert card_driver.driver_version() == "580.65.06"


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [("", 0, "says of driver_version: nothing"), (BROKEN, 9, "ends with 9 and says of driver_version: NVIDIA-SMI has")],
)
def test_a_driver_that_does_not_answer(text: str, code: int, why: str, answers: Path) -> None:
    says(answers, text, code)
    with pytest.raises(CardDriverUnavailable, match=why):
        card_driver.driver_version()
    with pytest.raises(CardDriverUnavailable, match=f"ends with {code}"):
        card_driver.memory_of_cards()


def test_a_machine_without_the_tool(answers: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has the driver's tool")
    assert not answers.exists()
    with pytest.raises(CardDriverUnavailable, match="nvidia-smi does not answer"):
        card_driver.memory_of_cards()


def test_a_tool_that_hangs(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers.write_text("#!/bin/sh\nexec sleep 60\n")
    answers.chmod(0o755)
    monkeypatch.setattr(card_driver, "ASK_TIMEOUT_S", 0.2)
    with pytest.raises(CardDriverUnavailable, match="does not answer"):
        card_driver.driver_version()


def test_the_module_names_its_version(tmp_path: Path) -> None:
    version = tmp_path / "version"
    assert card_driver.module_version(version) is None
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    assert card_driver.module_version(version) == "535.104.05"


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("int cuDriverGetVersion(int* v) { *v = 12040; return 0; }", "(12, 4)"),
        ("int cuDriverGetVersion(int* v) { return 100; }", "CUDA's error 100"),
        ("int something_else;", "has no cuDriverGetVersion"),
    ],
)
def test_the_library_of_the_driver(body: str, printed: str, tmp_path: Path) -> None:
    """In a process of its own, which finds a library of this name before any other."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = tmp_path / "cuda.c"
    source.write_text(body)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / card_driver.LIBRARY), str(source)], check=True)
    code = (
        "from moe_ray.model.compute.card_driver import latest_cuda\nfrom moe_ray.errors import CardDriverUnavailable\n"
        "try: print(latest_cuda())\nexcept CardDriverUnavailable as error: print(error)"
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert printed in done.stdout
