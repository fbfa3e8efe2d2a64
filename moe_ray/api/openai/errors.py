"""How each error of moe_ray looks to a client of OpenAI's API. No ray, no network."""

from __future__ import annotations

import re
from typing import Any

from moe_ray.errors import (
    InvalidRequest,
    LinkBroken,
    LinkTimeout,
    ModelNotFound,
    MoeRayError,
    NotReady,
    Overloaded,
    Unauthorized,
)


def error_body(exc: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Map an exception to (HTTP status, OpenAI error body, headers). Internals are never put in the message."""
    row = next((_ERRORS[kind] for kind in type(exc).__mro__ if kind in _ERRORS), _ERRORS[MoeRayError])
    status, kind, code, fixed, headers = row
    message = fixed or (str(exc) if status < 429 else _ADDRESS.sub("…", str(exc)))
    param = "model" if isinstance(exc, ModelNotFound) else getattr(exc, "param", None)
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, dict(headers)


# exception → status, type, code, message (None: the exception's own), headers; the nearest base class counts
_ERRORS: dict[type, tuple[int, str, str | None, str | None, dict[str, str]]] = {
    InvalidRequest: (400, "invalid_request_error", None, None, {}),
    Unauthorized: (401, "invalid_request_error", "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}),
    ModelNotFound: (404, "invalid_request_error", "model_not_found", None, {}),
    Overloaded: (429, "rate_limit_error", "rate_limit_exceeded", None, {"Retry-After": "1"}),
    NotReady: (503, "service_unavailable_error", "service_unavailable", None, {"Retry-After": "5"}),
    LinkBroken: (503, "service_unavailable_error", "service_unavailable", "A part of the model is unreachable.", {}),
    LinkTimeout: (503, "service_unavailable_error", "service_unavailable", "A part of the model is unreachable.", {}),
    MoeRayError: (500, "server_error", "internal_error", "The server failed to process the request.", {}),
}
_ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?|(?<![\w.])(?:/[\w.+-]+){2,}")
