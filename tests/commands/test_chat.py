"""`moe-ray chat` in a terminal, in a pipe and with one question, against a real trunk and gateway."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Trunk, served
from terminal import CTRL_C, CTRL_D, terminal

from moe_ray.api.service import HttpOptions

KEY = "sk-open-sesame"
RUN = "from moe_ray.commands.main import main; main()"


class Server:
    """A gateway over one trunk, in a thread: the URL, and the trunk to slow down."""

    def __init__(self, directory: Path) -> None:
        self.trunk = Trunk(directory)
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(directory)), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        self.trunk.close()

    async def _serve(self, directory: Path) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with served(directory, [self.trunk.info], HttpOptions(api_keys=(KEY,))) as client:
            self.url = str(client.base_url)
            self._ready.set()
            await self._end.wait()


@pytest.fixture(scope="module")
def model(kernel_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that recommends a sampling."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    directory.mkdir()
    for file in kernel_model.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "generation_config.json").unlink()
    (directory / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5, "top_p": 0.9}')
    return directory


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    running = Server(model)
    yield running
    running.close()


def chat(server: Server, *arguments: str, stdin: str = "", key: str = KEY) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OPENAI_API_KEY": key}
    command = [sys.executable, "-c", RUN, "chat", "--url", server.url, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, env=env, check=False)


GREEDY = ("--set", "temperature=0", "--set", "ignore_eos=true", "--set", "max_tokens=8")


def test_a_conversation_in_a_terminal(server: Server, tmp_path: Path) -> None:
    cache, saved = tmp_path / "cache", tmp_path / "talk.json"
    env = {"OPENAI_API_KEY": KEY, "MOE_RAY_CACHE_DIR": str(cache)}
    with terminal("chat", "--url", server.url, *GREEDY, **env) as screen:
        screen.until("random at http[^>]*> ")
        screen.type("/he\t")  # completed
        said = screen.until("Ctrl-D leaves\n\n> ")
        assert all(name in said for name in ("/system", "/set", "/undo", "/retry", "/multi", "/stats"))
        screen.type("/stats")
        screen.until("error: nothing was answered yet")
        screen.type("/set top_k 7")
        screen.until("top_k +7 +set")
        screen.type("/set")
        assert "the model recommends it" in screen.until("top_p +0.9[^\n]*\n")
        screen.type("/set top_p 2")
        screen.until("error: `top_p` must be between 0 and 1, got 2")
        screen.type("/sing")
        screen.until("error: no command /sing; /help lists them")
        screen.type("/system Be brief.")
        screen.until("Be brief.\n\n> ")
        screen.type("Hello")
        first = screen.until(r"8 tokens, [\d.]+ tokens/s, first after [\d.]+ s, cut at max_tokens\n\n> ")
        screen.type("/retry")
        again = screen.until("8 tokens.*\n\n> ")
        assert answer(again) == answer(first)
        screen.type("/stats")
        assert re.search(r"prompt tokens +\d\d", screen.until(r"ended by +length"))
        screen.type("/multi")
        screen.until(r"\. $")
        screen.type("One")
        screen.type("two")
        screen.type("/end")
        screen.until("8 tokens.*\n\n> ")
        screen.type(f"/save {saved}")
        screen.until("saved as ")
        screen.type("/undo")
        screen.until("forgotten: One\ntwo")
        screen.type(f"/load {saved}")
        screen.until("2 questions and their answers[^>]*> ")
        screen.press("never sent")
        screen.until("never sent")
        # Python's readline notices a signal while it waits for a key, not while it takes one.
        time.sleep(1)
        screen.press(CTRL_C)
        screen.until("\n> ")
        screen.press(CTRL_D)
        assert screen.ends() == 0
        assert "Traceback" not in screen.raw
    talk = json.loads(saved.read_text())
    assert [message["role"] for message in talk["messages"]] == ["system", *["user", "assistant"] * 2]
    assert talk["messages"][3]["content"] == "One\ntwo"
    assert talk["settings"] == {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, "top_k": 7}
    history = cache / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    lines = history.read_text().splitlines()
    assert lines[0] == "/help"
    assert "never sent" not in lines
    with terminal("chat", "--url", server.url, *GREEDY, **env) as screen:
        screen.until("> ")
        screen.press("\x1b[A\x1b[A")  # the line before the last of the conversation before
        screen.until("undo")
        screen.type("")
        screen.until("error: nothing was said yet[^>]*> ")
        screen.type("/quit")
        assert screen.ends() == 0


def answer(shown: str) -> str:
    """The last line as it stays: drawings before it, each filled up with blanks, are as many as time allows."""
    drawings = shown.rpartition("\n\n> ")[0].rpartition("\n")[0].strip().splitlines()[-1]
    return re.split(" {3,}", drawings)[-1]


def test_ctrl_c_keeps_what_came(server: Server, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    server.trunk.engine.pause_s = 0.05
    try:
        with terminal(
            *("chat", "--url", server.url, "--no-history", "--plain", *GREEDY, "--max-tokens", "400"),
            OPENAI_API_KEY=KEY,
            MOE_RAY_CACHE_DIR=str(tmp_path),
        ) as screen:
            screen.until("> ")
            screen.type("Hello")
            screen.until("Hello\n[^\n]{6}")
            screen.press(CTRL_C)
            screen.until(r"(tokens|pieces).*stopped\n\n> ")
            screen.type(f"/save {saved}")
            screen.until("saved as ")
            screen.type("/exit")
            assert screen.ends() == 0
    finally:
        server.trunk.engine.pause_s = 0
    assert not (tmp_path / "chat_history").exists()
    question, came = json.loads(saved.read_text())["messages"]
    assert question == {"role": "user", "content": "Hello"}
    assert came["content"]


def test_one_question(server: Server) -> None:
    done = chat(server, "Say", "something", *GREEDY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 5
    same = chat(server, "Say", "-", *GREEDY, stdin="something")
    assert same.stdout == done.stdout
    wrong = chat(server, "Say something", key="wrong")
    assert wrong.returncode == 1
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Incorrect API key" in line
    refused = chat(server, "Say something", "--temperature", "9")
    assert (refused.returncode, refused.stderr) == (1, "error: `temperature` must be between 0 and 2, got 9.0\n")


def test_lines_of_a_pipe_are_questions(server: Server) -> None:
    done = chat(server, *GREEDY, stdin="Hello\n/clear\n\nHello\n/multi\n/exit\nnever asked\n")
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == second
    assert "/multi is for a terminal" in done.stderr


def test_a_question_that_fails_is_told_and_the_rest_goes_on(server: Server) -> None:
    long = "word " * 2000
    done = chat(server, *GREEDY, stdin=f"{long}\nHello\n")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout.strip()
