"""A running server as commands ask it over HTTP, and the API key that they show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

import httpx

from moe_ray.errors import ConfigError, NotReady

if TYPE_CHECKING:
    from moe_ray.config import Config

OWN_HOSTS: Final = ("127.0.0.1", "::1", "localhost")


def own_key(config: Config, url: str) -> str | None:
    """The key of a server of this machine that the environment configures, too; other servers must not see it."""
    try:
        own = urlsplit(url).hostname in OWN_HOSTS
    except ValueError:  # brackets that are no address: told when it is asked
        own = False
    return next(iter(config.gateway.api_keys), None) if own else None


class ServerClient:
    """A server of OpenAI's API at one URL; past every proxy that the environment names. Not thread-safe."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Connects to nothing yet. Raises `ConfigError` for a URL or key that cannot be sent."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("--api-key: an API key is printable ASCII")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(10, read=600)
        try:
            self.client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {url}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def model_entries(self) -> list[dict[str, Any]]:
        """What GET /v1/models lists, as it is. Raises `NotReady` in one line when none answers."""
        response = self._ask("GET", "/v1/models")
        if response.status_code != 200:
            raise NotReady(f"{self.url} answers {message_of(response.content, response.status_code)}")
        try:
            return list(response.json()["data"])
        except (ValueError, KeyError, TypeError):
            return []

    def post(self, path: str, body: Mapping[str, Any]) -> str:
        """The text that a POST is answered with. Raises `NotReady` with what the server says, if it is not 200."""
        response = self._ask("POST", path, body)
        if response.status_code != 200:
            raise NotReady(message_of(response.content, response.status_code))
        return response.text

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            return self.client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotReady(f"no server answers at {self.url} ({error}); start one with `moe-ray serve`") from None


def message_of(content: bytes, status: int) -> str:
    """What a server says of a failure."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
