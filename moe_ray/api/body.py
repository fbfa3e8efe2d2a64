"""Reading a request's body up to a limit."""

from __future__ import annotations

from starlette.requests import Request

from moe_ray.errors import RequestTooLarge


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request. Raises `RequestTooLarge` as soon as it is known to have more than `most_bytes`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most_bytes:
        raise _too_large(most_bytes)
    pieces: list[bytes] = []
    length = 0
    async for piece in request.stream():
        length += len(piece)
        if length > most_bytes:
            raise _too_large(most_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(most_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has more than {most_bytes} bytes")
