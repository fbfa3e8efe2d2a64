"""What both ends of every link and trunk stream agree on, from the configuration."""

from __future__ import annotations

from ray._private.authentication.authentication_utils import is_token_auth_enabled

from moe_ray.config import Config, cluster_token
from moe_ray.transport.base import LinkOptions, TlsFiles


def link_options(config: Config) -> LinkOptions:
    """Token and TLS of the cluster that this process is connected to."""
    tls = TlsFiles(**config.tls.model_dump()) if config.tls else None
    return LinkOptions(token=cluster_token(config, is_token_auth_enabled()), tls=tls, native_dir=config.cache_dir)
