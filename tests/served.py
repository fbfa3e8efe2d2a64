"""An application on the tests' cluster: deploying one, waiting for it, asking and killing its parts."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from moe_ray.config import Config, load_config


@dataclass(frozen=True)
class Served:
    """A deployed application."""

    app_name: str
    url: str
    config: Config


def deploy(app_name: str, http_port: int, flags: dict[str, Any]) -> Served:
    """Deploy an application under /app_name and wait until it is ready."""
    from ray import serve

    from moe_ray.deploy.app import build_app

    config = load_config(flags)
    serve.run(build_app(config), name=app_name, route_prefix=f"/{app_name}")
    served = Served(app_name, f"http://127.0.0.1:{http_port}/{app_name}", config)
    wait_ready(served.url)
    return served


def wait_ready(url: str, timeout_s: float = 60.0) -> None:
    deadline, said = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except urllib.error.HTTPError as error:
            said = error.read().decode()
        except OSError as error:
            said = str(error)
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready: {said}")


def statuses(served: Served, deployment: str) -> list[dict[str, Any]]:
    """What each replica of a deployment says of itself."""
    from ray import serve

    return serve.get_deployment_handle(deployment, served.app_name).broadcast("status").results(timeout_s=10)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def complete(served: Served, prompt: object, on_chunk: Callable[[int], None] | None = None, **options: Any) -> str:
    """Stream a completion; `on_chunk` is called with the number of chunks so far."""
    body = {"prompt": prompt, "stream": True, "max_tokens": 40, "ignore_eos": True, "temperature": 0, **options}
    text, chunks = "", 0
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
                chunks += 1
                if on_chunk is not None:
                    on_chunk(chunks)
    return text


def by_hand(served: Served, experts: list[int], replicas: int | None, timeout_s: float = 60) -> str:
    """Run `moe-ray scale` on an application; what it printed."""
    from rich.console import Console

    from moe_ray.deploy.scale_by_hand import scale

    out = io.StringIO()
    scale(experts, replicas, Console(file=out, width=80), application=served.app_name, timeout_s=timeout_s)
    return out.getvalue()


def second_replicas(served: Served, expert: int, most: int = 4) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Give an expert a second replica, up to `most` times: what the first and the second one say of themselves.

    The second one has loaded everything by then, and answers calls; it is taken away before the next one.
    """
    name = f"Expert{expert}"
    (first,) = statuses(served, name)

    def both() -> bool:
        return all(each["calls"] and each["loaded_keys"] == each["keys"] for each in statuses(served, name))

    for _ in range(most):
        by_hand(served, [expert], 2)
        try:
            eventually(both)
            (second,) = (each for each in statuses(served, name) if each["pid"] != first["pid"])
            yield first, second
        finally:
            by_hand(served, [expert], None)


def eventually(condition: Callable[[], Any], timeout_s: float = 10.0, every_s: float = 0.05) -> Any:
    """Wait until `condition` holds, and return what it said."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(every_s)
    return found
