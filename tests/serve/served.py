"""An application on the tests' cluster: deploying one, and waiting for it."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

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

    from moe_ray.serve.app import build_app

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
