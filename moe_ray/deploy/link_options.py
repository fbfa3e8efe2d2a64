"""What both ends of every link and trunk stream agree on, from the configuration."""

from __future__ import annotations

from moe_ray.config import Config, cluster_token
from moe_ray.deploy.ray_internals import tokens_are_demanded
from moe_ray.transport.base import LinkOptions, TlsFiles


def link_options(config: Config) -> LinkOptions:
    """Token and TLS of the cluster that this process is connected to."""
    tls = TlsFiles(**config.tls.model_dump()) if config.tls else None
    return LinkOptions(token=cluster_token(config, tokens_are_demanded()), tls=tls, native_dir=config.cache_dir)
