"""A Ray of a bench's own: on loopback, with nothing that the `ray` carrier does not need, gone with its process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from moe_ray.deploy.local_ray import prepare_local_ray, start

OBJECT_STORE_BYTES = 256 * 2**20
NAMESPACE = "moe-ray-bench"


@contextmanager
def own_ray() -> Iterator[None]:
    """Start Ray and end it. The calling process must not have imported ray before."""
    prepare_local_ray()
    import ray

    start(
        namespace=NAMESPACE,
        num_cpus=1,  # Ray starts as many idle workers; actors of a bench reserve none
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
