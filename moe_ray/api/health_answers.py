"""What the probes answer, as /openapi.json describes it."""

from __future__ import annotations

from typing import Any, Final, Literal

from moe_ray.api.documented import Documented


class Healthy(Documented):
    """Requests are served."""

    status: Literal["ok"]


class Unhealthy(Documented):
    """Requests are not served yet, or not now."""

    status: Literal["not ready"]
    missing: list[str]
    """Parts of the model that are not up: `Trunk`, `Expert3`, …"""
    error: Literal["unhealthy"]
    error_type: Literal["healthcheck"]


HEALTH: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": Healthy, "description": "A trunk and every expert are up"},
    503: {"model": Unhealthy, "description": "A part of the model is not there"},
}
"""The `responses` of a route that answers as /health does. No key is asked for."""
