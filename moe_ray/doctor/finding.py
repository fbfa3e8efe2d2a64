"""What a check of this machine finds, and what the checks are asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_ray.config import Config

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what is right or wrong, and one of how to mend it."""

    check: str
    level: Level
    says: str
    mend: str = ""
    """Empty where nothing is wrong."""


def ok(check: str, says: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, "ok", says)


def warning(check: str, says: str, mend: str) -> Finding:
    """A server runs, but not as it could, or not in every case."""
    return Finding(check, "warning", says, mend)


def error(check: str, says: str, mend: str) -> Finding:
    """A server does not run, or a command does not work."""
    return Finding(check, "error", says, mend)


@dataclass(frozen=True, slots=True)
class Subject:
    """What the checks are about: a configuration on this machine."""

    config: Config
    """The defaults where the configuration itself is wrong."""
    config_fault: str | None
    """What is wrong with the configuration."""
    environ: Mapping[str, str]
    port: int
    """Where a server would listen for HTTP."""
    address: str
    """Of a Ray cluster, or `auto`."""
    model_given: bool
    """Whether the model is to be checked."""
    bytes_needed: Callable[[Config, Path], int]
    """Memory that the model in a checkpoint directory needs; looks every tensor up, raises `CheckpointError`."""


def as_size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
