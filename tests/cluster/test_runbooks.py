"""Runbooks name commands, flags, keys and files that exist, and link to sections that are there."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cluster_files import CLUSTER, ROOT

from moe_ray.commands.main import app
from moe_ray.config import Config, TlsSection
from moe_ray.deploy.app import build

PAGES = [CLUSTER / "README.md", *sorted((CLUSTER / "runbooks").glob("*.md"))]
SOURCES = [*PAGES, *CLUSTER.rglob("*.yaml"), *CLUSTER.rglob("*.sh"), CLUSTER / "Dockerfile", *CLUSTER.rglob("*.sbatch")]


@cache
def flags() -> dict[str, set[str]]:
    """`moe-ray` command → its flags."""
    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found[name] = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    return found


def commands(text: str) -> list[list[str]]:
    """The `moe-ray COMMAND …` calls in a page or script: up to the end of the line, a backtick, a pipe or the like."""
    found = re.findall(r"(?<![\w/.-])(?:\.venv/bin/)?moe-ray ([a-z].*?)(?:[`;|)&#\]\"]|\s{2,}|[.,:]\s|$)", text, re.M)
    return [call.split() for call in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_every_moe_ray_command_and_flag_exists(path: Path) -> None:
    for words in commands(path.read_text()):
        if words[0] not in flags():
            assert path.suffix not in (".md", ".sh"), f"moe-ray has no {words[0]!r}"
            continue
        for word in words[1:]:
            flag = word.split("=")[0].rstrip(",")
            if flag.startswith("--"):
                assert flag in flags()[words[0]], f"moe-ray {words[0]} has no {flag}"


def test_the_check_above_sees_the_commands() -> None:
    seen = [words for page in PAGES for words in commands(page.read_text())]
    assert len(seen) > 20
    assert ["scale", "3", "5", "--replicas", "2", "--address", "HOST:6379"] in seen


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_script_and_its_flags_exist(path: Path) -> None:
    for script, rest in re.findall(r"([a-z-]+\.sh)((?: [^`&\n#|]*)?)", path.read_text()):
        text = (CLUSTER / "bare-metal" / script).read_text()
        for flag in re.findall(r"(?<!\S)--[a-z-]+", rest.split(" -- ")[0]):
            assert re.search(rf"^ +(-h \| )?{flag}\)", text, re.M), f"{script} has no {flag}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        page = (path.parent / name) if name else path
        if "helm/" not in name:
            assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_every_configuration_key_that_is_named_exists(path: Path) -> None:
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    for section, key in re.findall(
        r"\b(model|engine|trunk|experts|gateway|tls)\.([a-z_]+)(?![\w(/.-])", path.read_text()
    ):
        if key in ("yaml", "crt"):  # a file
            continue
        known = set(TlsSection.model_fields if section == "tls" else sections[section].model_fields)
        assert key in known, f"{section} has no key {key}"


def test_the_index_lists_every_directory() -> None:
    text = (CLUSTER / "README.md").read_text()
    here = {path.name for path in CLUSTER.iterdir() if path.is_dir() and path.name not in ("docker", "__pycache__")}
    assert here == set(re.findall(r"^\| \[`([a-z-]+)/`\]", text, re.M))
    for page in (CLUSTER / "runbooks").glob("*.md"):
        assert f"(runbooks/{page.name})" in text


def test_nothing_has_an_unbalanced_quote() -> None:
    """Of the commands in the runbooks' code blocks."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                shlex.split(line, comments=True)


def test_a_second_trunk_comes_by_the_file_as_the_runbook_says(demo_model: Path) -> None:
    """Of what is deployed from a file `moe-ray scale trunk` changes nothing; `deployments` beside `args` does."""
    from ray.serve.schema import ServeDeploySchema

    text = (CLUSTER / "runbooks" / "scale.md").read_text().split("## The trunk")[1].split("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (written,) = yaml.safe_load(block)["applications"]
    ServeDeploySchema.parse_obj({"applications": [{**written, "import_path": "moe_ray.deploy.app:build"}]})
    (override,) = written["deployments"]
    assert override == {"name": "Trunk", "num_replicas": 2}
    built = build({"model": {"path": str(demo_model)}})._bound_deployment
    (trunk,) = [
        each._bound_deployment
        for each in built.init_args
        if getattr(getattr(each, "_bound_deployment", None), "name", "") == "Trunk"
    ]
    assert trunk._deployment_config.autoscaling_config is None, "else Serve would refuse a number of replicas"
    for page in PAGES:
        for line in page.read_text().splitlines():
            assert "moe-ray scale trunk" not in line or "`moe-ray serve`" in line, f"{page.name}: {line}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_key_is_an_argument(path: Path) -> None:
    """Arguments can be read by every user of a machine."""
    text = path.read_text()
    assert not re.search(r"""-H ["'][Aa]uthorization: Bearer \$""", text)
    assert not re.search(r"moe-ray [^`\n]*--api-key", text)


@pytest.mark.parametrize("path", [PAGES[0], CLUSTER / "runbooks" / "alerts.md"], ids=lambda path: path.stem)
def test_shells_are_told_of_the_token_before_they_ask(path: Path) -> None:
    text = path.read_text()
    told = text.index("export RAY_AUTH_MODE=token")
    assert told < text.index("\n## ")
    assert "RAY_AUTH_TOKEN_PATH" in text[told : told + 100]


def test_scripts_can_be_run() -> None:
    for script in CLUSTER.rglob("*.sh"):
        sourced = script.name == "common.sh"
        assert bool(script.stat().st_mode & 0o111) != sourced, script.relative_to(ROOT)
