"""The cache directory of a command: the configured one, or another where that cannot be written."""

from __future__ import annotations

import os

from rich.console import Console

from moe_ray.config import Config
from moe_ray.deploy.places import usable_cache


def with_usable_cache(config: Config, console: Console) -> Config:
    """`config` with a cache directory that can be written, also for what else in this process reads the environment.

    Says so where it is not the configured one. Raises `ConfigError` where there is none.
    """
    cache = usable_cache(config.cache_dir)
    if cache == config.cache_dir:
        return config
    console.print(
        f"cache directory {config.cache_dir} cannot be written, using {cache} (MOE_RAY_CACHE_DIR sets another)",
        markup=False,
        soft_wrap=True,
    )
    os.environ["MOE_RAY_CACHE_DIR"] = str(cache)
    return config.model_copy(update={"cache_dir": cache})
