"""A gateway's own port: HTTP over it, and what happens where it cannot be had."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.responses import PlainTextResponse

from moe_ray.config.gateway import Listen
from moe_ray.deploy import own_port
from moe_ray.deploy.own_port import OwnPort
from moe_ray.errors import ConfigError

APP = PlainTextResponse("here")


def held(host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server((host, 0))


async def asked(listen: Listen) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        return await client.get(f"http://{listen}/")


async def refused(listen: Listen) -> None:
    """Return once nobody listens."""
    for _ in range(500):
        try:
            await asked(listen)
        except httpx.ConnectError:
            return
        except (httpx.RemoteProtocolError, httpx.ReadError):
            continue  # taken in by a server that ends
        await asyncio.sleep(0.01)
    raise AssertionError("it still listens")


def test_a_port_is_waited_for_and_given_back() -> None:
    before = held()
    listen = Listen("127.0.0.1", before.getsockname()[1])

    async def talk() -> None:
        asyncio.get_running_loop().call_later(0.5, before.close)
        port = await OwnPort.open(APP, listen)
        response = await asked(listen)
        assert (response.status_code, response.text) == (200, "here")
        assert "server" not in response.headers
        port.close()
        await refused(listen)

    asyncio.run(talk())


def test_an_address_of_ipv6() -> None:
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 ({error.strerror})")
    listen = Listen("::1", probe.getsockname()[1])
    probe.close()

    async def talk() -> None:
        port = await OwnPort.open(APP, listen)
        assert (await asked(listen)).text == "here"
        port.close()
        await refused(listen)

    asyncio.run(talk())


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000: "):
        asyncio.run(OwnPort.open(APP, Listen("192.0.2.1", 8000)))
    monkeypatch.setattr(own_port, "BIND_WITHIN_S", 0.0)
    with held() as other, pytest.raises(ConfigError, match="Address already in use"):
        asyncio.run(OwnPort.open(APP, Listen("127.0.0.1", other.getsockname()[1])))
