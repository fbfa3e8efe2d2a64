"""Asks Ray Serve who else serves what a replica holds: its own deployment's other replicas. Control plane only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moe_ray.core import ReplicaInfo
from moe_ray.errors import NotReady

logger = logging.getLogger(__name__)

TIMEOUT_S = 1.0


def find_peers(deployment: str, application: str) -> Callable[[], list[ReplicaInfo]]:
    """Return a function that lists the replicas of a deployment that run now; for use outside event loops.

    It raises `NotReady` when none answers within `TIMEOUT_S`.
    """

    def ask() -> list[ReplicaInfo]:
        began = time.monotonic()
        try:
            handle = serve.get_deployment_handle(deployment, application)
        except (KeyError, RayServeException, RayError) as error:  # KeyError: it is being taken down
            raise NotReady(f"{deployment}: {error}") from error
        try:
            results = handle.broadcast("endpoint").results(timeout_s=TIMEOUT_S, return_exceptions=True)
        except (RayServeException, RayError, TimeoutError, ConnectionError) as error:
            raise NotReady(f"{deployment}: {error or type(error).__name__}") from error
        finally:
            handle.shutdown()  # it would go on telling Serve how many of its requests wait
        found = [result for result in results if isinstance(result, ReplicaInfo)]
        logger.debug("%s: %d replicas answered within %.3f s", deployment, len(found), time.monotonic() - began)
        return found

    return ask
