"""Fixtures of the transport tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import echo_expert
import pytest

from moe_ray.core import ReplicaInfo
from moe_ray.transport.base import MAILBOX_ADDRESS


@pytest.fixture(scope="session")
def expert_process() -> Iterator[Callable[..., tuple[ReplicaInfo, int]]]:
    """Starts a process with a real expert server of one carrier; returns its info and pid. All are killed at last."""
    processes: list[subprocess.Popen[str]] = []

    def start(carrier: str, token: str | None = None) -> tuple[ReplicaInfo, int]:
        process = subprocess.Popen(
            [sys.executable, echo_expert.__file__, carrier, *([token] if token else [])],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        addresses = process.stdout.readline().split()
        names = ("socket", MAILBOX_ADDRESS) if carrier in ("card", "cuda") else (carrier,)
        return echo_expert.info(dict(zip(names, addresses, strict=True))), process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()
