"""Checks of the cards of this machine: the driver, and whether torch's build can use them."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from moe_ray.doctor.finding import Finding, Subject, error, ok, warning
from moe_ray.errors import CardDriverUnavailable
from moe_ray.model.compute import card_driver

MPS_PIPES: Final = "/tmp/nvidia-mps"
"""Where CUDA MPS has its pipes unless CUDA_MPS_PIPE_DIRECTORY says otherwise (NVIDIA's guide to MPS)."""
MPS_CONTROL: Final = "control"
"""The pipe of its daemon, `nvidia-cuda-mps-control -d`, which removes it when it ends."""
_CHECK: Final = "cards"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What of NVIDIA's is on this machine, and what torch was built for."""

    devices: int
    """Cards that this process sees as device files."""
    driver: str | None
    """The kernel module's version."""
    driver_cuda: tuple[int, int] | None
    """The latest CUDA that the driver's library speaks; None: the library is not there."""
    torch: str | None
    """torch's version."""
    torch_cuda: str | None
    """CUDA that torch was built for; None: for CPUs only."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES."""
    wanted: bool
    """The configuration asks for a card."""
    triton_lacks: str | None = None
    """What Triton needs once to compile its driver.c, and does not find."""
    mps: bool = False
    """Whether CUDA MPS runs, so that processes which share a card compute on it at once."""


def card_facts(subject: Subject, devices: Path = card_driver.DEVICES) -> CardFacts:
    """Look at device files, driver and torch's build; loads no torch."""
    return CardFacts(
        devices=card_driver.device_files(devices),
        driver=card_driver.module_version(),
        driver_cuda=_driver_cuda(),
        torch=_torch_version(),
        torch_cuda=_torch_cuda(),
        visible=subject.environ.get("CUDA_VISIBLE_DEVICES"),
        wanted="cuda" in (subject.config.model.device, subject.config.trunk.device, subject.config.experts.device),
        triton_lacks=None if subject.config.model.kernels == "torch" else triton_lacks(subject.environ),
        mps=mps_runs(subject.environ),
    )


def triton_lacks(environ: Mapping[str, str], headers: Path | None = None) -> str | None:
    """What of a C compiler and Python's headers `triton.runtime.build` would not find; None: nothing."""
    if not environ.get("CC") and not any(shutil.which(name, path=environ.get("PATH")) for name in ("gcc", "clang")):
        return "a C compiler"
    headers = headers or Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").exists() else f"Python's headers in {headers}"


def mps_runs(environ: Mapping[str, str]) -> bool:
    """Whether the pipe of CUDA MPS's daemon is there, which processes of this environment would find."""
    return (Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_PIPES) / MPS_CONTROL).exists()


def check_cards(facts: CardFacts) -> list[Finding]:
    """Cards, driver and torch fit together; a machine without cards is fine."""
    complain = error if facts.wanted else warning
    if not facts.devices:
        if facts.wanted:
            return [error(_CHECK, "none, and model.device is cuda", "set model.device to auto or cpu")]
        return [ok(_CHECK, "none; CPUs compute")]
    cards = f"{facts.devices} card(s)"
    if facts.driver_cuda is None:
        mend = "install NVIDIA's driver; in a container, start it with the NVIDIA runtime (--gpus all)"
        return [complain(_CHECK, f"{cards}, but the driver's library {card_driver.LIBRARY} is not there", mend)]
    if facts.torch_cuda is None:
        mend = f"install torch {(facts.torch or '').split('+')[0]} built for CUDA {facts.driver_cuda[0]}"
        return [complain(_CHECK, f"{cards}, but torch {facts.torch} is built for CPUs only", mend)]
    if facts.driver_cuda[0] < int(facts.torch_cuda.split(".")[0]):
        says = f"{cards}; torch is built for CUDA {facts.torch_cuda}, driver {facts.driver} speaks up to "
        mend = "update the driver, or install a torch built for an earlier CUDA"
        return [complain(_CHECK, says + ".".join(map(str, facts.driver_cuda)), mend)]
    if facts.visible is not None and facts.visible.strip() in ("", "-1"):
        return [complain(_CHECK, f"{cards}, all hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")]
    if facts.triton_lacks is not None:
        says = f"{cards}, but Triton's kernels need {facts.triton_lacks}"
        return [complain(_CHECK, says, "install gcc and Python's headers (python3-dev), or set model.kernels to torch")]
    sharing = "CUDA MPS runs" if facts.mps else "without CUDA MPS: processes that share a card take turns on it"
    return [ok(_CHECK, f"{cards}, driver {facts.driver}, torch for CUDA {facts.torch_cuda}; {sharing}")]


def examine_cards(subject: Subject) -> Sequence[Finding]:
    """Cards, driver, torch."""
    return check_cards(card_facts(subject))


def _driver_cuda() -> tuple[int, int] | None:
    try:
        return card_driver.latest_cuda()
    except CardDriverUnavailable:
        return None


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """`cuda` of torch/version.py, which is read and not run: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.exists():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node, ast.AnnAssign):
            return node.value.value if isinstance(node.value, ast.Constant) and node.value.value else None  # type: ignore[return-value]
    return None
