"""`moe-ray chat`: a streaming conversation with a running server, in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import httpx
from rich.console import Console

from moe_ray.api.sse import SseReader
from moe_ray.errors import MoeRayError, NotReady

HELP = "/help, /reset (forget the conversation), /quit (or Ctrl-D); Ctrl-C stops an answer"


def chat_loop(
    url: str,
    model: str | None,
    system: str | None,
    temperature: float,
    max_tokens: int,
    console: Console,
    api_key: str | None = None,
) -> None:
    """Read lines, stream answers, until end of input. Raises `NotReady` when no server answers at `url`."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=600), trust_env=False) as client:
        name = model or _served_model(client, url)
        interactive = sys.stdin.isatty()
        if interactive:
            console.print(f"[bold]{name}[/] at {url}. {HELP}")
        while (line := _read_line(interactive)) is not None:
            if line in ("/quit", "/exit"):
                return
            if line == "/help":
                console.print(HELP)
            elif line == "/reset":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                body = {"model": name, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
                messages.append({"role": "assistant", "content": _answer(client, body, console)})


def _answer(client: httpx.Client, body: dict[str, Any], console: Console) -> str:
    """Stream one answer to standard output and return it; a fault is told, and ends only this answer."""
    pieces: list[str] = []
    started, first = time.perf_counter(), None
    try:
        for piece in _stream(client, body):
            first = first or time.perf_counter()
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except (MoeRayError, httpx.HTTPError) as error:
        console.print(f"[red]error:[/] {error}")
    print(flush=True)
    if first is not None and len(pieces) > 1 and console.is_terminal:
        rate = (len(pieces) - 1) / max(time.perf_counter() - first, 1e-6)
        console.print(f"[dim]first token {first - started:.2f} s, {rate:.1f} chunks/s[/]")
    return "".join(pieces)


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise NotReady(_message(response.read(), response.status_code))
        reader = SseReader()
        for data in chain.from_iterable(map(reader.feed, response.iter_bytes())):
            if data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise NotReady(chunk["error"]["message"])
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content"):
                    yield piece


def _served_model(client: httpx.Client, url: str) -> str:
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise NotReady(f"no server answers at {url} ({error}); start one with `moe-ray serve`") from None
    if response.status_code != 200:
        raise NotReady(f"{url} answers {_message(response.content, response.status_code)}")
    return str(response.json()["data"][0]["id"])


def _message(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def _read_line(interactive: bool) -> str | None:
    try:
        return input("\n> " if interactive else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return None
