"""The commands that a server prints when it is ready can be typed as they are, under any address and any proxy."""

from __future__ import annotations

import io
import shlex
from typing import Any

import pytest
from rich.console import Console

from moe_ray.commands.greeting import curl_command, greet, other_commands
from moe_ray.commands.page_control import with_page_control
from moe_ray.commands.timeline import Timeline
from moe_ray.config import load_config


def test_the_usual_place() -> None:
    words = shlex.split(curl_command(load_config(), "http://127.0.0.1:8000"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert other_commands("http://127.0.0.1:8000", "127.0.0.1:6379", "") == [
        ("chat", "moe-ray chat"),
        ("status", "moe-ray status --address 127.0.0.1:6379"),
    ]


def test_an_ipv6_address() -> None:
    assert "-g http://[::1]:8000/v1" in curl_command(load_config(), "http://[::1]:8000"), "curl globs brackets"
    assert other_commands("http://[::1]:8000", "x:1", "")[0] == ("chat", "moe-ray chat --url http://[::1]:8000")


def test_a_proxy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert shlex.split(curl_command(load_config(), "http://127.0.0.1:8000"))[1:3] == ["--noproxy", "*"]
    commands = dict(other_commands("http://127.0.0.1:8000", "x:1", "127.0.0.1:8265"))
    assert commands["Ray"].startswith("NO_PROXY='*' RAY_AUTH_MODE=token ray list actors ")


def test_keys_are_not_printed() -> None:
    config = load_config({"gateway": {"api_keys": ["secret-key"]}, "model": {"served_name": "it's"}})
    out = io.StringIO()
    timeline = Timeline()
    timeline.mark("model")
    greet(config, "http://127.0.0.1:8000", "x:1", "", Console(file=out, width=80), timeline)
    assert "secret-key" not in out.getvalue()
    assert '"Authorization: Bearer $OPENAI_API_KEY"' in out.getvalue()
    assert "page    http://127.0.0.1:8000/ " in out.getvalue()


@pytest.mark.parametrize(
    ("flags", "host", "own_ray", "control"),
    [
        ({}, "127.0.0.1", True, True),
        ({}, "::1", True, True),
        ({}, "0.0.0.0", True, False),
        ({}, "127.0.0.1", False, False),
        ({"model": {"path": "/some/model"}}, "127.0.0.1", True, False),
        ({"gateway": {"page": {"control": False}}}, "127.0.0.1", True, False),
        ({"model": {"path": "/some/model"}, "gateway": {"page": {"control": True}}}, "0.0.0.0", False, True),
    ],
)
def test_what_the_page_may_change(flags: dict[str, Any], host: str, own_ray: bool, control: bool) -> None:
    config = with_page_control(load_config(flags), host, own_ray)
    assert config.gateway.page.control is control
    assert config.gateway.page.enabled
