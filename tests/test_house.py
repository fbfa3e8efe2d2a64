"""The house stays one that can be lived in: no file imports itself through others, and each file is one thing."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import pytest

import moe_ray

ROOT = Path(moe_ray.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if not {"pb", "__pycache__"} & set(path.parts)]
SOURCES = [*FILES, *sorted(ROOT.rglob("*.h")), *sorted(ROOT.rglob("*.cpp"))]
MAX_LINES: Final = 300
LONGER: Final[dict[str, tuple[int, str]]] = {  # file → (its limit, why it may be longer)
}
COMMON_NAMES: Final = {"__init__.py"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports: lazily, or for type checkers alone, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else str(node.module))
    return {name for name in found if name in NAMES} - {name_of(path)}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_file_imports_itself_through_others() -> None:
    found = circles({name: imported(path) for name, path in NAMES.items()})
    assert not found, "\n".join(" ⇄ ".join(component) for component in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_thing(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit, _ = LONGER.get(name, (MAX_LINES, ""))
    assert lines <= limit, f"{lines} lines: split it, or say in LONGER why not"
    assert name not in LONGER or lines > MAX_LINES, "no longer longer: take it out of LONGER"


def test_no_file_name_stands_in_three_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        relative = path.relative_to(ROOT)
        rooms.setdefault(path.name, set()).add(relative.parts[0])
    crowded = {name: sorted(where) for name, where in rooms.items() if len(where) > 2 and name not in COMMON_NAMES}
    assert not crowded


def test_no_two_classes_of_one_name() -> None:
    """Public ones; a private class is known to its file alone."""
    where: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twins = {name: files for name, files in where.items() if len(files) > 1}
    assert not twins
