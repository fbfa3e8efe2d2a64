"""`moe-ray support-bundle`: all that somebody needs who is to find out what is wrong, without secrets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ray.commands.options import DEFAULT_PORT, ConfigFile, RayAddress, error_console

if TYPE_CHECKING:
    from moe_ray.doctor.bundle import Bundle
    from moe_ray.doctor.finding import Subject


def support_bundle(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The archive.", show_default="moe-ray-support-DATE.tar.gz", dir_okay=False),
    ] = None,
    config: ConfigFile = None,
    address: RayAddress = "auto",
    log_mib: Annotated[float, typer.Option(help="Most MiB of the end of each log.", min=0.001)] = 1.0,
) -> None:
    """Collect versions, checks, configuration, Ray's and Serve's state and logs in an archive; secrets are left out."""
    import time

    from moe_ray.commands.doctor import subject_of
    from moe_ray.doctor.bundle import Bundle, add_installation, add_logs, known_secrets
    from moe_ray.doctor.examine import findings
    from moe_ray.doctor.redaction import Redactor

    console = error_console()
    path = output or Path(time.strftime("moe-ray-support-%Y%m%d-%H%M%S.tar.gz"))
    subject = subject_of(None, config, DEFAULT_PORT, address)
    bundle = Bundle(Redactor(known_secrets(subject, config)))
    with console.status("collecting"):
        add_installation(bundle, subject, list(findings(subject)))
        _add_clusters(bundle, subject)
        add_logs(bundle, subject.environ, int(log_mib * 2**20))
        bundle.write(path)
    for what, why in bundle.missing.items():
        console.print(f"not in it: {what}: {why}", style="dim", markup=False, soft_wrap=True)
    console.print("Look it through before you send it: host names, paths and addresses are in it.", soft_wrap=True)
    print(path)


def _add_clusters(bundle: Bundle, subject: Subject) -> None:
    """Add each cluster of this machine, or the one that is named, as long as it is joined."""
    from moe_ray.deploy.cluster_state import each_cluster
    from moe_ray.deploy.ray_internals import serve_details
    from moe_ray.deploy.status import collect
    from moe_ray.doctor.bundle import add_cluster
    from moe_ray.doctor.ray_state import cluster_addresses

    addresses, fault = cluster_addresses(subject)
    if fault is not None:
        bundle.missing["cluster"] = fault
    elif not addresses:
        bundle.missing["cluster"] = "no Ray runs on this machine"
    for state in each_cluster(addresses):
        add_cluster(
            bundle,
            state,
            {"serve.json": lambda: dict(serve_details()), "status.json": lambda: collect("auto")},
        )
