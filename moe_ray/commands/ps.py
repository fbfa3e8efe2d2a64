"""`moe-ray ps`: every process of a running application in one table."""

from __future__ import annotations

import json
from dataclasses import asdict

from moe_ray.commands.options import JsonOutput, RayAddress, output_console


def ps(address: RayAddress = "auto", json_output: JsonOutput = False) -> None:
    """List the processes of the running application: where each is, what it computes with, memory, load, state."""
    from moe_ray.commands.ps_report import process_view
    from moe_ray.deploy.process_table import process_rows
    from moe_ray.deploy.status import collect

    rows = process_rows(collect(address))
    if json_output:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        output_console().print(process_view(rows))
