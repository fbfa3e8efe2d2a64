"""What `--adapter NAME=PATH` says."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.errors import ConfigError


def named_sources(given: Sequence[str] | None) -> dict[str, str] | None:
    """The adapters of `--adapter`, given any number of times: name → source. Raises `ConfigError`."""
    if not given:
        return None
    named: dict[str, str] = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--adapter {each}: expected NAME=PATH")
        if name in named:
            raise ConfigError(f"--adapter {each}: {name!r} is given twice")
        named[name] = source
    return named
