"""What both ends of every link and trunk stream agree on, from the configuration."""

from __future__ import annotations

import grpc.aio
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from moe_ray.config import Config, cluster_token
from moe_ray.transport.base import LinkOptions, TlsFiles
from moe_ray.transport.grpc import channel_options, read_pem


def link_options(config: Config) -> LinkOptions:
    """Token and TLS of the cluster that this process is connected to."""
    tls = TlsFiles(**config.tls.model_dump()) if config.tls else None
    native = None if config.model.kernels == "torch" else config.cache_dir
    return LinkOptions(token=cluster_token(config, is_token_auth_enabled()), tls=tls, native_dir=native)


def open_aio_channel(address: str, options: LinkOptions) -> grpc.aio.Channel:
    """An asyncio channel to host:port, with TLS if `options` has it. Connects lazily. Raises `ConfigError`."""
    settings = channel_options(options)
    if options.tls is None:
        return grpc.aio.insecure_channel(address, options=settings)
    certificate, key, ca = read_pem(options.tls)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=settings)
