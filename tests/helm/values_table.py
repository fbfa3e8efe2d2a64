"""The table of values in the chart's README, made from values.yaml. Run it to write the table anew."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from helm_rendering import CHART

TABLE = "<!-- values: begin -->", "<!-- values: end -->"


def documented() -> dict[str, tuple[str, Any]]:
    """Path of each documented value → its comment and its default; "" for a comment that is not there."""
    text = (CHART / "values.yaml").read_text()
    comments: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    words: list[str] | None = None
    skip_below: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if comment := re.match(r"\s*# -- (.*)", line):
            words = [comment[1]]
        elif (more := re.match(r"\s*# (.*)", line)) and words is not None:
            words.append(more[1])
        elif key := re.match(r"\s*([A-Za-z][\w]*):", line):
            if skip_below is not None and indent > skip_below:
                continue
            skip_below = None
            stack = [(depth, name) for depth, name in stack if depth < indent]
            path = ".".join([name for _, name in stack] + [key[1]])
            if words is not None:
                comments[path] = " ".join(words)
                skip_below = indent
            stack.append((indent, key[1]))
            words = None
        else:
            words = None

    found: dict[str, tuple[str, Any]] = {}

    def walk(value: Any, path: str) -> None:
        if path in comments or not isinstance(value, dict) or not value:
            found[path] = (comments.get(path, ""), value)
        else:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)

    walk(yaml.safe_load(text), "")
    return found


def table() -> str:
    """Markdown, one row per value, in the order of the file."""
    rows = ["| value | default | |", "|---|---|---|"]
    for path, (text, value) in documented().items():
        default = json.dumps(value).replace("|", "\\|")
        rows.append(f"| `{path}` | `{default}` | {text} |")
    return "\n".join(rows)


def main() -> None:
    """Replace the table in the README."""
    readme = CHART / "README.md"
    before, begin, rest = readme.read_text().partition(TABLE[0])
    _, end, after = rest.partition(TABLE[1])
    readme.write_text(f"{before}{begin}\n{table()}\n{end}{after}")


if __name__ == "__main__":
    main()
