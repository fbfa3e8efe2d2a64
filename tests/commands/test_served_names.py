"""The names that `moe-ray serve` is given reach the configuration."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from moe_ray.commands import launch
from moe_ray.commands.main import app
from moe_ray.config import Config, load_config
from moe_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "served", "aliases"),
    [
        ("", "demo", ()),
        ("--served-model-name mine", "mine", ()),
        (
            "--served-model-name mine --served-model-name claude-* --served-model-name other",
            "mine",
            ("claude-*", "other"),
        ),
    ],
)
def test_the_first_name_is_the_models_and_others_are_aliases(
    monkeypatch: pytest.MonkeyPatch, flags: str, served: str, aliases: tuple[str, ...]
) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(launch, "run", lambda config, *_: configs.append(config))
    done = CliRunner().invoke(app, ["serve", *flags.split()])
    assert done.exit_code == 0, done.output
    assert (configs[0].served_name, configs[0].model.aliases) == (served, aliases)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="aliases"):
        load_config({"model": {"aliases": ["x", " "]}})
