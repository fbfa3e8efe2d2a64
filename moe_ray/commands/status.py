"""`moe-ray status`: every actor of a running application."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moe_ray.commands.options import JsonOutput, RayAddress, output_console


def status(
    address: RayAddress = "auto",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew again and again, until q.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks, with --watch.", min=0.1)] = 1.0,
    json_output: JsonOutput = False,
) -> None:
    """Show every actor of the running application: where it is, its state, memory and load."""
    from moe_ray.deploy.status import collect, print_status

    if watch:
        from moe_ray.commands.status_watch import watch_status

        watch_status(address, interval, output_console(), json_output)
        return
    snapshot = collect(address)
    if json_output:
        print(json.dumps(snapshot, indent=1))
    else:
        print_status(output_console(), snapshot)
