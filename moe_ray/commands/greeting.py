"""What `moe-ray serve` prints once it is ready: where it listens, and commands to try."""

from __future__ import annotations

import json
import shlex

from rich.console import Console

from moe_ray.commands.options import DEFAULT_URL
from moe_ray.commands.timeline import Timeline
from moe_ray.config import Config
from moe_ray.deploy.urls import taken_by_proxy

QUESTION = "What is the capital of France?"


def greet(config: Config, url: str, ray_address: str, dashboard: str, console: Console, timeline: Timeline) -> None:
    """Print where the server at `url` is reached; `dashboard` is host:port, "" where there is none."""
    console.print(f"\n[bold green]ready[/] in {timeline.total:.1f} s: [bold]{url}/v1[/]   (Ctrl-C stops it)")
    console.print(f"  {timeline}\n", style="dim", highlight=False, soft_wrap=True)
    console.print(f"  {curl_command(config, url)}\n", soft_wrap=True, markup=False)
    for what, command in other_commands(url, ray_address, dashboard, config.gateway.page.enabled):
        console.print(f"  {what:<8}{command}", markup=False, soft_wrap=True)
    console.print()


def curl_command(config: Config, url: str) -> str:
    """A question to the server, for a shell; past a proxy where the environment names one."""
    body = {"model": config.served_name, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    words = ["curl", *(["--noproxy '*'"] if taken_by_proxy(url) else []), *(["-g"] if "[" in url else [])]
    headers = ["-H 'Content-Type: application/json'"]
    if config.gateway.api_keys:
        headers.append('-H "Authorization: Bearer $OPENAI_API_KEY"')
    return " ".join([*words, f"{url}/v1/chat/completions", *headers, "-d", shlex.quote(json.dumps(body))])


def other_commands(url: str, ray_address: str, dashboard: str, page: bool = False) -> list[tuple[str, str]]:
    """(what, command) of each further command to try, or where the page is, if there is one."""
    commands = [
        *([("page", f"{url}/  (in a browser)")] if page else []),
        ("chat", "moe-ray chat" + ("" if url == DEFAULT_URL else f" --url {url}")),
        ("status", f"moe-ray status --address {ray_address}"),
    ]
    if dashboard:
        direct = "NO_PROXY='*' " if taken_by_proxy(f"http://{dashboard}") else ""
        commands.append(("Ray", f"{direct}RAY_AUTH_MODE=token ray list actors --address http://{dashboard}"))
        commands.append(("", f"{direct}RAY_AUTH_MODE=token serve status --address http://{dashboard}"))
    return commands
