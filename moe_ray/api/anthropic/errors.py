"""How a failure looks to a client of Anthropic's API."""

from __future__ import annotations

import uuid
from typing import Any, Final

from moe_ray.api.failure import Failure

# Anthropic's own servers say 529 where a model is overloaded; here it is 503, which proxies know. Clients retry both.
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def new_request_id() -> str:
    """What a client may name when it asks about a request; in the header `request-id`, and in our log."""
    return f"req_{uuid.uuid4().hex}"


def error_body(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error response, or the data of the event that ends a stream."""
    error = {"type": _KINDS.get(failure.status, "api_error"), "message": failure.message}
    return {"type": "error", "error": error, "request_id": request_id or new_request_id()}
