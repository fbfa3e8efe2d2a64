"""What takes HTTP requests, as it was asked for and as it can be."""

from __future__ import annotations

import pytest

from moe_ray.commands.ingress import choose_ingress, proxy_location, with_listening_gateway
from moe_ray.config import load_config
from moe_ray.config.gateway import Listen
from moe_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "own_ray", "num_gateways", "chosen"),
    [
        ("auto", True, 1, "direct"),
        ("auto", True, 2, "python"),
        ("auto", False, 1, "python"),
        ("direct", True, 1, "direct"),
        ("python", True, 1, "python"),
        ("haproxy", True, 3, "haproxy"),
    ],
)
def test_what_auto_is(asked: str, own_ray: bool, num_gateways: int, chosen: str) -> None:
    assert choose_ingress(asked, own_ray, num_gateways) == chosen


@pytest.mark.parametrize(
    ("asked", "own_ray", "num_gateways", "why"),
    [
        ("nginx", True, 1, "ingress 'nginx' is not one of auto, direct, python, haproxy"),
        ("direct", False, 1, "--address"),
        ("direct", True, 2, "gateway.num_replicas is 2"),
    ],
)
def test_what_cannot_be(asked: str, own_ray: bool, num_gateways: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        choose_ingress(asked, own_ray, num_gateways)


def test_a_gateway_that_listens_needs_no_proxy() -> None:
    assert with_listening_gateway(load_config(), Listen("::1", 8000)).gateway.listen == "[::1]:8000"
    assert proxy_location("direct", own_ray=True) == "Disabled"
    assert proxy_location("python", own_ray=True) == proxy_location("haproxy", own_ray=True) == "HeadOnly"
    assert proxy_location("python", own_ray=False) == "EveryNode"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8000", "127.0.0.1", 8000), ("[::1]:80", "::1", 80), ("a-host.example:65535", "a-host.example", 65535)],
)
def test_where_to_listen(text: str, host: str, port: int) -> None:
    assert Listen.parse(text) == Listen(host, port)
    assert load_config({"gateway": {"listen": text}}).gateway.listen == text == str(Listen(host, port))


@pytest.mark.parametrize(
    "text", ["", "8000", ":8000", "::1:8000", "[::1]", "host:", "host:0", "host:65536", "http://a:1"]
)
def test_where_nobody_can_listen(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`gateway\.listen`: .*HOST:PORT"):
        load_config({"gateway": {"listen": text}})


def test_several_gateways_cannot_listen_at_one_address() -> None:
    with pytest.raises(ConfigError, match=r"`listen` is for one gateway"):
        load_config({"gateway": {"listen": "127.0.0.1:8000", "num_replicas": 2}})
