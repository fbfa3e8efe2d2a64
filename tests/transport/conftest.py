"""Fixtures of the transport tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import echo_expert
import pytest

from moe_ray.core import ReplicaInfo


@pytest.fixture(scope="session")
def grpc_process() -> Iterator[Callable[..., tuple[ReplicaInfo, int]]]:
    """Starts a process with a real gRPC expert server; returns its info and pid. All are killed in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(token: str | None = None) -> tuple[ReplicaInfo, int]:
        process = subprocess.Popen(
            [sys.executable, echo_expert.__file__, *([token] if token else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        return echo_expert.info({"grpc": address}), process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()
