"""What takes HTTP requests: the gateway itself, or Serve's proxies before it."""

from __future__ import annotations

from typing import Final

from moe_ray.config import Config
from moe_ray.config.gateway import Listen
from moe_ray.errors import ConfigError

INGRESSES: Final = ("auto", "direct", "python", "haproxy")


def choose_ingress(asked: str, own_ray: bool, num_gateways: int) -> str:
    """What `auto` is: `direct` where one gateway serves on a Ray of our own, else `python`; others as asked.

    Raises `ConfigError` for what is none of `INGRESSES`, and for `direct` where requests must be shared out.
    """
    if asked not in INGRESSES:
        raise ConfigError(f"ingress {asked!r} is not one of {', '.join(INGRESSES)}")
    if asked == "direct" and not own_ray:
        raise ConfigError("--ingress direct is for a Ray of our own; with --address, Serve's proxies take the requests")
    if asked == "direct" and num_gateways > 1:
        raise ConfigError(f"--ingress direct is for one gateway, and gateway.num_replicas is {num_gateways}")
    if asked != "auto":
        return asked
    return "direct" if own_ray and num_gateways == 1 else "python"


def with_listening_gateway(config: Config, listen: Listen) -> Config:
    """`config` with a gateway that listens there itself."""
    gateway = config.gateway.model_copy(update={"listen": str(listen)})
    return config.model_copy(update={"gateway": gateway})


def proxy_location(ingress: str, own_ray: bool) -> str:
    """On which nodes Serve starts proxies, in its words."""
    if ingress == "direct":
        return "Disabled"
    return "HeadOnly" if own_ray else "EveryNode"
