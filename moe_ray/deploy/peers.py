"""Asks Ray Serve who else serves what a replica holds, and whether anybody will. Control plane only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from moe_ray.core import ReplicaInfo
from moe_ray.errors import NotReady

logger = logging.getLogger(__name__)

TIMEOUT_S = 1.0
LOOK_S = 0.2
SUCCESSOR_S = 30.0
"""How long a replica that is told to go waits for another one to come up."""


def find_peers(deployment: str, application: str, timeout_s: float = TIMEOUT_S) -> Callable[[], list[ReplicaInfo]]:
    """Return a function that lists the replicas of a deployment that run now; for use outside event loops.

    It raises `NotReady` when none answers within `timeout_s`.
    """

    def ask() -> list[ReplicaInfo]:
        began = time.monotonic()
        try:
            handle = serve.get_deployment_handle(deployment, application)
        except (KeyError, RayServeException, RayError) as error:  # KeyError: it is being taken down
            raise NotReady(f"{deployment}: {error}") from error
        try:
            results = handle.broadcast("endpoint").results(timeout_s=timeout_s, return_exceptions=True)
        except (RayServeException, RayError, TimeoutError, ConnectionError) as error:
            raise NotReady(f"{deployment}: {error or type(error).__name__}") from error
        finally:
            handle.shutdown()  # it would go on telling Serve how many of its requests wait
        found = [result for result in results if isinstance(result, ReplicaInfo)]
        logger.debug("%s: %d replicas answered within %.3f s", deployment, len(found), time.monotonic() - began)
        return found

    return ask


def is_ending(application: str) -> bool:
    """Whether an application is being deleted, or is gone, or Serve is: then nobody takes over from its replicas."""
    try:
        status = serve.status().applications.get(application)
    except (RayServeException, RayError):
        return True
    return status is None or status.status == ApplicationStatus.DELETING


def wait_for_successor(
    find: Callable[[], Sequence[ReplicaInfo]], ending: Callable[[], bool], replica_id: str, at_most_s: float
) -> None:
    """Return once a replica other than this one has loaded all that it holds: until then trunks may have nobody else.

    Returns at once when the application is `ending`, after `at_most_s`, and after `SUCCESSOR_S` if no other one has
    come up: it may be waiting for the very card that this one holds. `find` raises `NotReady` when none answers.
    """
    began = time.monotonic()
    while not ending():
        try:
            others = [info for info in find() if info.replica_id != replica_id]
        except NotReady:
            others = []
        except Exception:
            logger.exception("replicas of the same deployment cannot be listed")
            others = []
        if others and not any(info.loading for info in others):
            return
        if time.monotonic() - began >= (at_most_s if others else min(SUCCESSOR_S, at_most_s)):
            return
        time.sleep(LOOK_S)
