"""How a failure looks to a client of TGI's API."""

from __future__ import annotations

from typing import Any, Final

from moe_ray.api.failure import Failure

# status of a failure → TGI's status, its error_type, what stands before the message
_KINDS: Final[dict[int, tuple[int, str, str]]] = {
    400: (422, "validation", "Input validation error: "),
    401: (401, "unauthorized", ""),
    404: (404, "not_found", ""),
    405: (405, "not_found", ""),
    413: (413, "validation", "Input validation error: "),
    429: (429, "overloaded", "Model is overloaded: "),
    503: (503, "healthcheck", ""),
}
_INCOMPLETE: Final = "incomplete_generation"
_OTHER: Final = (424, "generation", "Request failed during generation: ")


def status(failure: Failure) -> int:
    """TGI's status: 422 for a request that is wrong, 424 for one that could not be computed, 500 for half an answer."""
    return 500 if failure.code == _INCOMPLETE else _KINDS.get(failure.status, _OTHER)[0]


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error response."""
    if failure.code == _INCOMPLETE:
        return {"error": "Incomplete generation", "error_type": _INCOMPLETE}
    _, kind, before = _KINDS.get(failure.status, _OTHER)
    if failure.status == 400 and failure.param == "messages":
        kind, before = "template_error", "Template error: "
    return {"error": before + failure.message, "error_type": kind}


def stream_error(failure: Failure) -> dict[str, Any]:
    """The event of a stream that failed: whatever lacks then, it failed during generation."""
    if failure.code == _INCOMPLETE:
        return {"error": "Incomplete generation stream", "error_type": f"{_INCOMPLETE}_stream"}
    if failure.status == 503:
        return {"error": _OTHER[2] + failure.message, "error_type": _OTHER[1]}
    return error_body(failure)
