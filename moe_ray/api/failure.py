"""How an error ends an HTTP request, whatever the API: status, message for the client, headers. Mapped here once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from moe_ray.errors import (
    AdapterError,
    ContextLengthExceeded,
    Forbidden,
    IncompleteGeneration,
    InvalidRequest,
    LinkBroken,
    LinkTimeout,
    ModelNotFound,
    MoeRayError,
    NotReady,
    Overloaded,
    RequestTooLarge,
    ResponseNotFound,
    Unauthorized,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told of an error. Each API writes it in its own format."""

    status: int
    message: str
    """Without internals of the server."""
    param: str | None = None
    """The field of the request that is to blame."""
    code: str | None = None
    """What programs tell this failure from others of its status by."""
    headers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: BaseException, retry_after_s: int = 1) -> Failure:
    """The failure that an exception is; the nearest base class in `_STATUSES` counts.

    `retry_after_s` is told with every status that may pass: 429 and 503.
    """
    status, fixed = next((_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES), _UNFORESEEN)
    message = fixed or (str(error) if status < 429 else _ADDRESS.sub("…", str(error)))
    param = "model" if isinstance(error, ModelNotFound) else getattr(error, "param", None)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(retry_after_s)
    code = _CODES.get(type(error)) or (error.code if isinstance(error, InvalidRequest) else None)
    return Failure(status, message, param, code, headers)


_UNREACHABLE: Final = "A part of the model is unreachable."
_UNFORESEEN: Final[tuple[int, str | None]] = (500, "The server failed to process the request.")
# exception → status, message (None: the exception's own)
_STATUSES: Final[dict[type, tuple[int, str | None]]] = {
    InvalidRequest: (400, None),
    AdapterError: (400, None),
    Unauthorized: (401, None),
    Forbidden: (403, None),
    ModelNotFound: (404, None),
    RequestTooLarge: (413, None),
    ResponseNotFound: (404, None),
    Overloaded: (429, None),
    NotReady: (503, None),
    LinkBroken: (503, _UNREACHABLE),
    LinkTimeout: (503, _UNREACHABLE),
    MoeRayError: _UNFORESEEN,
}
_CODES: Final[dict[type, str]] = {
    ContextLengthExceeded: "context_length_exceeded",
    IncompleteGeneration: "incomplete_generation",
    ModelNotFound: "model_not_found",
}
_ADDRESS: Final = re.compile(
    r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?|(?<![\w.])(?:/[\w.+-]+){2,}"
)
