"""Prints a config file with ${NAME} and ${NAME:-default} replaced from the environment.

With --url: prints where this machine reaches the gateway.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def render(text: str, environment: Mapping[str, str]) -> str:
    """Replace the variables outside comments. Raises `KeyError` naming one without value and default."""

    def replaced(match: re.Match[str]) -> str:
        name, default = match.groups()
        if value := environment.get(name):
            return value
        if default is None:
            raise KeyError(name)
        return default

    lines = (line if line.lstrip().startswith("#") else VARIABLE.sub(replaced, line) for line in text.splitlines(True))
    return "".join(lines)


def gateway_url(text: str) -> str:
    """Where this machine reaches the gateway of a rendered config file."""
    import yaml

    http = (yaml.safe_load(text) or {}).get("http_options") or {}
    host = http.get("host", "127.0.0.1")
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{http.get('port', 8000)}"


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--url"]
    if len(arguments) != 1:
        sys.exit("usage: render.py [--url] FILE")
    try:
        rendered = render(Path(arguments[0]).read_text(encoding="utf-8"), os.environ)
    except KeyError as missing:
        sys.exit(f"error: {arguments[0]} needs the environment variable {missing.args[0]}")
    print(gateway_url(rendered) if "--url" in sys.argv else rendered, end="")
