"""`moe-ray scale`: replicas of experts and trunk, set by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_ray.commands.options import RayAddress, error_console
from moe_ray.errors import ConfigError


def scale(
    units: Annotated[list[str], typer.Argument(help="Numbers of experts, or `trunk`.", metavar="EXPERT|trunk...")],
    replicas: Annotated[int | None, typer.Option(min=1, help="Run exactly so many of each.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Give them back to the configuration's policy.")] = False,
    address: RayAddress = "auto",
) -> None:
    """Set the replicas of these experts, or of the trunk, while the application serves; returns when they run."""
    if auto == (replicas is not None):
        raise ConfigError("give either --replicas N or --auto")
    from moe_ray.deploy.scale_by_hand import parse_units
    from moe_ray.deploy.scale_by_hand import scale as run_scale

    run_scale(parse_units(units), replicas, error_console(), address)
