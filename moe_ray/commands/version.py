"""`moe-ray version`."""

from __future__ import annotations

from moe_ray import __version__


def version() -> None:
    """Print the version."""
    print(__version__)
