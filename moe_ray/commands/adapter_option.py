"""What `--adapter NAME=PATH` and `--variant NAME=PATH` say."""

from __future__ import annotations

from collections.abc import Sequence

from moe_ray.errors import ConfigError


def named_sources(given: Sequence[str] | None, flag: str = "--adapter") -> dict[str, str] | None:
    """The adapters of `--adapter`, given any number of times: name → source. Raises `ConfigError`."""
    if not given:
        return None
    named: dict[str, str] = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"{flag} {each}: expected NAME=PATH")
        if name in named:
            raise ConfigError(f"{flag} {each}: {name!r} is given twice")
        named[name] = source
    return named


def named_variants(given: Sequence[str] | None) -> list[dict[str, str]] | None:
    """The models of `--variant`, given any number of times, as the list `variants`. Raises `ConfigError`."""
    named = named_sources(given, "--variant")
    return None if named is None else [{"name": name, "path": path} for name, path in named.items()]
