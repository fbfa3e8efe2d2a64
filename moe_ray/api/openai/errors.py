"""How a failure looks to a client of OpenAI's API."""

from __future__ import annotations

from typing import Any, Final

from moe_ray.api.failure import Failure

# status → type, code
_KINDS: Final[dict[int, tuple[str, str | None]]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", None),
    405: ("invalid_request_error", None),
    413: ("invalid_request_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("service_unavailable_error", "service_unavailable"),
}
_OTHER: Final = ("server_error", "internal_error")


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error response, or of the event that ends a stream."""
    kind, code = _KINDS.get(failure.status, _OTHER)
    code = failure.code or code
    return {"error": {"message": failure.message, "type": kind, "param": failure.param, "code": code}}
