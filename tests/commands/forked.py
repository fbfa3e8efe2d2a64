"""The `moe-ray` command in a process of its own, without its imports: a fork of one process that made them.

A command that starts as a user starts it spends two seconds on imports. What a test asks of many mistakes is the same
in a fork: its own environment, streams, exit status and end of the interpreter.

`ForkServer` runs this file; the file reads one JSON list a line, [arguments, environment, directory], and forks: the
child reads and writes stdin, stdout and stderr of that directory, and the parent answers with the child's exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

STREAMS = ("stdin", "stdout", "stderr")
LIMIT_S = 120


class ForkServer:
    """Starts on first use with `environment`; each command gets its own on top of that. Not thread-safe."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def run(self, *arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """What `moe-ray` with these arguments gives. `env` may only name what is read once the command runs."""
        assert all(name.startswith(("MOE_RAY_", "XDG_")) for name in env), "the fork has read its environment already"
        if self._process is None:
            command = [sys.executable, __file__]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            (directory / "stdin").write_text(stdin)
            print(json.dumps([arguments, {**self._environment, **env}, name]), file=self._process.stdin, flush=True)
            assert self._process.stdout is not None
            returncode = int(self._process.stdout.readline())
            said = [(directory / stream).read_text() for stream in STREAMS[1:]]
        return subprocess.CompletedProcess(["moe-ray", *arguments], returncode, *said)

    def close(self) -> None:
        """End the process; the next command starts another."""
        if self._process is not None:
            self._process.communicate(timeout=10)
            self._process = None


def become_command(arguments: list[str], environment: dict[str, str], directory: Path) -> None:
    """In the child: what the command finds when it starts."""
    for number, stream in enumerate(STREAMS):
        opened = os.open(directory / stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["moe-ray", *arguments]
    signal.alarm(LIMIT_S)  # a command that hangs is killed


def serve_forks() -> None:
    """Fork for each line of stdin; returns in a child, and in the parent when stdin ends.

    The command finds `sys.stdin` and `sys.stdout` as nobody has used them: this process talks over copies of both.
    """
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers:
        for line in requests:
            arguments, environment, directory = json.loads(line)
            child = os.fork()
            if child == 0:
                become_command(arguments, environment, Path(directory))
                return
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    import gc
    import importlib

    from moe_ray.deploy.local_ray import prepare_local_ray

    prepare_local_ray()  # as `serve` does before it imports ray
    for module in ("moe_ray.commands.launch", "moe_ray.llm"):
        importlib.import_module(module)
    from moe_ray.commands.main import main

    gc.collect()
    gc.freeze()  # else each child copies every page at its end
    serve_forks()
    main()
