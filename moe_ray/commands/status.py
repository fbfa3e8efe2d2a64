"""`moe-ray status`: every actor of a running application."""

from __future__ import annotations

import json

from moe_ray.commands.options import JsonOutput, RayAddress, output_console


def status(
    address: RayAddress = "auto",
    json_output: JsonOutput = False,
) -> None:
    """Show every actor of the running application: where it is, its state, memory and load."""
    from moe_ray.deploy.status import collect, print_status

    snapshot = collect(address)
    if json_output:
        print(json.dumps(snapshot, indent=1))
    else:
        print_status(output_console(), snapshot)
