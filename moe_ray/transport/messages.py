"""Headers as they come off a socket, and what went wrong with it, in words."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from moe_ray.errors import ProtocolError

H = TypeVar("H", bound=Message)


def parse(kind: type[H], data: bytes) -> H:
    """Read a header. Raises `ProtocolError`."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"a header that is no {kind.__name__}: {error}") from None


def say(error: Exception) -> str:
    """What to tell of an error: what the system says, the message, or the type."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
