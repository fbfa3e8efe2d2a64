"""The version of what travels between trunk and expert, and the one line that a peer of another version gets."""

from __future__ import annotations

from typing import Final

from moe_ray.errors import ProtocolError

WIRE_VERSION: Final = 3
"""Of headers, frames and handshakes; raised with every change that a peer must know of. 3: adapters."""


def other_version(theirs: int | str) -> ProtocolError:
    """The error to raise when the other end speaks another version.

    >>> str(other_version(1))
    'it speaks wire version 1, this process 3'
    """
    return ProtocolError(f"it speaks wire version {theirs}, this process {WIRE_VERSION}")
