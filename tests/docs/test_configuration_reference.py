"""docs/configuration.md is what the models say, and what it says about variables is so."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from documents import ROOT

from moe_ray.config import load_config
from moe_ray.errors import ConfigError


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs" / "generate_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|(?: `(MOE_RAY_\w+)` \|)?$", re.M)


def rows(generator: ModuleType) -> list[tuple[str, ...]]:
    """(key, type, default, allowed, meaning, variable) of each row."""
    return ROW.findall(generator.page())


def test_the_file_is_up_to_date(generator: ModuleType) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "stale: run `make docs`"


def test_every_key_is_there_and_has_a_meaning(generator: ModuleType) -> None:
    found = rows(generator)
    assert len(found) > 70
    assert len(found) == len(re.findall(r"^\| `\w+` \|", generator.page(), re.M)), "a row that the pattern does not see"
    for key, *_, meaning, _ in found:
        assert meaning.endswith((".", "…")), f"{key} has no docstring"


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("max_num_seqs", ("integer", "`64`", "at least 1")),
        ("micro_batches", ("choice or integer", "`auto`", "`auto`, 1 to 8")),
        ("on_expert_loss", ("choice", "`wait`", "`wait`, `fail`, `renormalise`")),
        ("target_busy", ("number", "`0.6`", "above 0, at most 1")),
        ("kv_cache_gib", ("number", "", "above 0")),
        ("certificate", ("text", "required", "")),
        ("api_keys", ("list of text", "`[]`", "")),
        ("overrides", ("mapping, integer → mapping", "`{}`", "")),
    ],
)
def test_type_default_and_bounds(generator: ModuleType, key: str, row: tuple[str, str, str]) -> None:
    assert {each[1:4] for each in rows(generator) if each[0] == key} == {row}


def test_every_variable_is_read(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one changes the configuration, or is refused for what stands in it."""
    before = load_config()
    variables = [row[5] for row in rows(generator) if row[5]]
    assert len(variables) == len(set(variables)) > 60
    for variable in variables:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "no-such-value")
            try:
                refused = ""
                read = load_config() != before
            except ConfigError as error:
                refused = str(error)
                read = variable.removeprefix("MOE_RAY_").split("__")[0].lower() in refused
            assert read, f"{variable} is not read: {refused}"
