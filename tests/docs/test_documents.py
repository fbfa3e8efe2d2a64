"""What the documents name exists: commands, flags, files, modules, keys, variables, links; their code is code."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from documents import CHANGELOG, PAGES, README, ROOT, anchors, blocks, inline, links, name_of, read

from moe_ray.commands.fleet_file import read_fleet
from moe_ray.commands.main import app
from moe_ray.commands.tgi_arguments import TgiArguments, flag_of
from moe_ray.config import Config, load_config

pages = pytest.mark.parametrize("page", PAGES, ids=name_of)

TOP = sorted({p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - {"build", "dist"})
PATH = re.compile(rf"(?<![\w./~-])((?:{'|'.join(map(re.escape, TOP))}|\.ci)(?:/[\w.-]+)+)")
MODULE = re.compile(r"(?<![\w./-])(moe_ray(?:\.\w+)+)(?::(\w+))?")
KEY = re.compile(r"(?<![\w./-])((?:model|engine|trunk|experts|gateway|tls)(?:\.[a-z_]+)+)(?![\w(/-])")
OTHERS_FLAGS = {"--set", "--reuse-values", "--logs", "--head", "--node-ip-address", "--generate", "--role", "--strict"}
"""Flags of helm, ray, the cluster scripts and mypy."""

LAUNCHER_FLAGS = {flag_of(name) for name in TgiArguments.model_fields}


@cache
def command_flags() -> dict[tuple[str, ...], set[str]]:
    """Words of each `moe-ray` command → its flags."""
    found: dict[tuple[str, ...], set[str]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        found[words] = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def calls(page: Path) -> list[list[str]]:
    """The words after `moe-ray` wherever it is called: up to the end of the line, a backtick, a pipe or the like."""
    text = read(page).replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.-])(?:\.venv/bin/)?moe-ray ([a-z][^`;|)&#\n]*)", text)
    return [call.split() for call in found]


def test_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


@pages
def test_every_command_and_flag_exists(page: Path) -> None:
    known = command_flags()
    for words in calls(page):
        command: tuple[str, ...] = ()
        while words[len(command) : len(command) + 1] and (*command, words[len(command)]) in known:
            command = (*command, words[len(command)])
        group = any(words_of[:-1] == command for words_of in known if words_of)
        rest = words[len(command) : len(command) + 1]
        assert not (group and rest and re.fullmatch(r"[a-z]+", rest[0])), f"moe-ray has no {' '.join(words)!r}"
        for word in words:
            flag = word.split("=")[0].rstrip(",.:")
            if flag.startswith("--"):
                assert flag in known[command], f"moe-ray {' '.join(command)} has no {flag}"


def test_the_check_above_sees_the_calls() -> None:
    seen = [words for page in PAGES for words in calls(page)]
    assert ["scale", "3", "5", "--replicas", "2"] in seen
    assert ["bench", "engine", "--model", "demo"] in seen


@pages
def test_every_flag_that_stands_alone_exists(page: Path) -> None:
    """In a table, say: some command has it."""
    known = set().union(*command_flags().values()) | OTHERS_FLAGS | LAUNCHER_FLAGS
    for code in inline(page):
        if code.startswith("-") and not code.startswith("---"):
            for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", code):
                assert flag in known, f"no command has {flag}"


@pages
def test_every_bench_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`bench ([a-z]+)`", read(page)):
        assert ("bench", name) in command_flags()


@pages
def test_every_path_exists(page: Path) -> None:
    for path in PATH.findall(read(page)):
        assert (ROOT / path.rstrip(".")).exists(), f"no {path}"
    files = {path.name for top in TOP for path in (ROOT / top).rglob("*.py")}
    for code in inline(page):
        if re.fullmatch(r"\w+\.py", code):
            assert code in files, f"no file is called {code}"


@pages
def test_every_module_and_name_in_it_exists(page: Path) -> None:
    for dotted, attribute in MODULE.findall(read(page)):
        parts = dotted.split(".")
        names = [attribute] if attribute else []
        while not _module(parts):
            names.insert(0, parts.pop())
            assert parts, f"no module {dotted}"
        assert len(names) < 2, f"no module {dotted}"
        for name in names:
            assert re.search(rf"\b{name}\b", _module(parts)), f"{'.'.join(parts)} has no {name}"


def _module(parts: list[str]) -> str:
    """The source of a module; "" where there is none. An empty package has a comment for its source."""
    path = ROOT.joinpath(*parts)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file.read_text(encoding="utf-8") or "# empty"
    return ""


@pages
def test_every_configuration_key_exists(page: Path) -> None:
    for code in [*inline(page), *blocks(page, "bash")]:
        for dotted in KEY.findall(code):
            if dotted.rpartition(".")[2] in ("py", "crt", "yaml", "key"):  # a file
                continue
            section: Any = Config
            for key in dotted.split("."):
                fields = getattr(section, "model_fields", {})
                assert key in fields, f"no key {dotted}"
                section = fields[key].annotation


@pages
def test_every_variable_of_ours_exists(page: Path) -> None:
    documented = set(re.findall(r"MOE_RAY_\w+", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")))
    for name in re.findall(r"MOE_RAY_[A-Z_]*[A-Z]", read(page)):
        assert name in documented, f"no variable {name}"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"no {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name or page.name} has no heading {anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set(), [README]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        left += [(page.parent / target.partition("#")[0]).resolve() for target in links(page) if target[0] != "#"]
    assert set(PAGES) <= reached


def test_every_room_is_on_the_floor_plan() -> None:
    plan = set(inline(ROOT / "docs" / "architecture.md"))
    for path in sorted((ROOT / "moe_ray").iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            assert any(code.startswith(f"moe_ray/{path.name}/") for code in plan), f"{path.name} is missing"
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"moe_ray/{path.name}" in plan, f"{path.name} is missing"


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = [*inline(page), *[line for block in blocks(page, "bash") for line in block.splitlines()]]
    for code in commands:
        if found := re.match(r"make ([a-z-]+)", code):
            assert found[1] in targets, f"no target {found[1]}"


@pages
def test_python_is_python_and_its_imports_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_ray"):
                source = _module((node.module or "").split("."))
                assert all(re.search(rf"\b{alias.name}\b", source) for alias in node.names)


@pages
def test_shell_is_shell(page: Path) -> None:
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert not done.returncode, f"{block}\n{done.stderr}"


@pages
def test_yaml_is_configuration(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        if "machines" in (keys := set(yaml.safe_load(block))):
            assert read_fleet(str(file)).devices
            continue
        assert keys <= set(Config.model_fields)
        load_config(file=file)


@pages
def test_no_language_is_overlooked(page: Path) -> None:
    """Each block says what it is, or is a picture or what a command prints."""
    text = read(page)
    assert len(re.findall(r"^```", text, re.M)) % 2 == 0
    assert set(re.findall(r"^```(\w+)", text, re.M)) <= {"bash", "python", "yaml"}


def test_the_changelog_knows_the_version() -> None:
    from moe_ray import __version__

    versions = re.findall(r"^## \[([^]]+)\]", CHANGELOG.read_text(encoding="utf-8"), re.M)
    assert versions[0] == "Unreleased"
    assert __version__ in versions
