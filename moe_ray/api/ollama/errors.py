"""How a failure looks to a client of ollama's API."""

from __future__ import annotations

from typing import Any

from moe_ray.api.failure import Failure


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error response, or the line that ends a stream."""
    return {"error": failure.message}
