"""What a Ray that we start ourselves is told through the environment, before Ray is imported."""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

CONNECT_TIMEOUT_S: Final = 5.0
_SETTINGS = {
    # Else Ray replaces 127.0.0.1 by the machine's own address, and half of its ports listen on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else every level of actors runs 15 steps lower
    # Every tenth of a second, by default: three per cent of a core that the experts could use.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # With --ingress haproxy, stopping waits for this long: for load balancers, of which there are none here.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}


def prepare_local_ray() -> None:
    """Make the Ray that this process will start listen on loopback only; its processes inherit the settings.

    Call it before ray is imported, and only where Ray is started here, not joined. What the user has set stays.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def reach(address: str) -> str:
    """Return `address` after preparing `ray.init` of this process to join it; call it right before.

    For a Ray on this machine two defaults of Ray are undone: that it replaces a loopback address by the machine's own,
    and that it shows the user's token only to clusters it found by itself. Raises `ConnectionError` where nobody
    listens: `ray.init` would try for minutes.
    """
    from ray._private import ray_constants
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import find_gcs_addresses

    host, colon, port = address.rpartition(":")
    if colon and "://" not in address and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"nobody answers there ({error})") from None
    here = address in find_gcs_addresses()
    ray_constants.ENABLE_RAY_CLUSTER = not (here and address.startswith("127."))
    if here:
        logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return address
