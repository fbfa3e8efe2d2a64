"""A gateway that asks for an API key, over HTTP: httpx, the openai client and `moe-ray chat`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, deploy

from moe_ray.config import load_config
from moe_ray.errors import ConfigError

KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def guarded(kernel_model: Path, http_port: int) -> Iterator[Served]:
    """A random model in one process, with every id of its tokenizer."""
    from ray import serve

    model = {"path": str(kernel_model), "served_name": "guarded"}
    yield deploy("guarded", http_port, {"model": model, "transport": "local", "gateway": {"api_keys": KEYS}})
    serve.delete("guarded")


def test_only_who_shows_a_key_is_served(guarded: Served) -> None:
    body = {"model": "guarded", "prompt": [3, 4, 5], "max_tokens": 2}
    with httpx.Client(base_url=guarded.url, timeout=60, trust_env=False) as client:
        assert client.get("/health").status_code == 200, "probes have no key"
        for headers in ({}, {"Authorization": "Bearer third-key"}, {"Authorization": "first-key"}):
            for response in (
                client.post("/v1/completions", json=body, headers=headers),
                client.post("/v1/chat/completions", json={"messages": []}, headers=headers),
                client.get("/v1/models", headers=headers),
                client.get("/v1/models/guarded", headers=headers),
                client.get("/experts", headers=headers),
            ):
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert not any(key in response.text for key in KEYS)
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}"}
            assert len(client.get("/v1/models", headers=headers).json()["data"]) == 1
            assert client.post("/v1/completions", json=body, headers=headers).json()["usage"]["completion_tokens"] == 2


def test_the_openai_client_shows_its_key(guarded: Served) -> None:
    ask = {"model": "guarded", "prompt": "a", "max_tokens": 1}
    right = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[1], max_retries=0, timeout=60)
    assert right.completions.create(**ask).usage.completion_tokens == 1
    wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0, timeout=60)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        wrong.completions.create(**ask)


def test_moe_ray_chat_shows_its_key(guarded: Served) -> None:
    def chat(*flags: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", "from moe_ray.commands.main import main; main()"]
        command = [*program, "chat", "--url", guarded.url, "--max-tokens", "2", *flags]
        return subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120)

    assert chat("--api-key", KEYS[0]).returncode == 0
    refused = chat()
    assert refused.returncode != 0
    assert "No API key provided" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_keys_come_from_the_environment_and_must_fit_into_a_header(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOE_RAY_GATEWAY__API_KEYS", json.dumps(KEYS))
    assert load_config().gateway.api_keys == tuple(KEYS)
    assert KEYS[0] not in repr(load_config().gateway)
    for wrong in ("", "two words", "naïve", "line\nbreak"):
        with pytest.raises(ConfigError, match="api_keys"):
            load_config({"gateway": {"api_keys": [wrong]}})
