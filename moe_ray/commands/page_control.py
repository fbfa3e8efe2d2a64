"""Whether the page of `moe-ray serve` may scale experts and kill replicas, where nobody has said so."""

from __future__ import annotations

import ipaddress

from moe_ray.config import Config
from moe_ray.config.model import DEMO_MODEL


def with_page_control(config: Config, host: str, own_ray: bool) -> Config:
    """`config` with `gateway.page.control` decided: on for the demo model, on a loopback address, on a Ray of our own.

    The demo model is for trying things out, and only programs on this machine reach it. What was said holds.
    """
    page = config.gateway.page
    if page.control is not None:
        return config
    demo = config.model.path == DEMO_MODEL and own_ray and _is_loopback(host)
    gateway = config.gateway.model_copy(update={"page": page.model_copy(update={"control": demo})})
    return config.model_copy(update={"gateway": gateway})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
