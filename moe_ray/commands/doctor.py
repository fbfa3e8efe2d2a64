"""`moe-ray doctor`: what of this machine would keep a server from running, and how to mend it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.completion import models
from moe_ray.commands.options import (
    DEFAULT_PORT,
    MODEL_HELP,
    ConfigFile,
    JsonOutput,
    RayAddress,
    error_console,
    output_console,
)

if TYPE_CHECKING:
    from moe_ray.config import Config
    from moe_ray.doctor.finding import Subject


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Check it, too. {MODEL_HELP}", autocompletion=models)
    ] = None,
    config: ConfigFile = None,
    port: Annotated[int, typer.Option(help="HTTP port of a server.", min=1, max=65535)] = DEFAULT_PORT,
    address: RayAddress = "auto",
    json_output: JsonOutput = False,
) -> None:
    """Check this machine, its Ray and a model: what is wrong, and how to mend it. Exit status 1 if anything is."""
    from moe_ray.commands.doctor_report import print_finding, print_summary
    from moe_ray.doctor.examine import findings

    subject = subject_of(model, config, port, address)
    console = output_console()
    found = []
    with (error_console() if json_output else console).status("looking"):  # one console draws both
        for finding in findings(subject):
            found.append(finding)
            if not json_output:
                print_finding(console, finding)
    if json_output:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print_summary(console, found)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(1)


def subject_of(model: str | None, file: Path | None, port: int, address: str) -> Subject:
    """What the checks are asked about; a configuration that is wrong is one of their findings."""
    from moe_ray.config import Config, load_config
    from moe_ray.doctor.finding import Subject
    from moe_ray.errors import ConfigError

    environ = dict(os.environ)
    try:
        config, fault = load_config({"model": {"path": model}}, file), None
    except ConfigError as error:
        config, fault = Config.model_construct(), str(error)
    return Subject(config, fault, environ, port, address, model is not None, _bytes_needed)


def _bytes_needed(config: Config, directory: Path) -> int:
    from moe_ray.commands.planned import GIB, planned

    plan = planned(config, directory).plan
    cache = config.engine.kv_cache_gib
    return plan.whole_need_bytes if cache is None else plan.total_bytes + int(cache * GIB)
