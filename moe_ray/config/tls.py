"""The `tls` section: certificates of expert and trunk ports."""

from __future__ import annotations

from moe_ray.config.section import Section


class TlsSection(Section):
    """PEM files for mutual TLS on expert and trunk ports."""

    certificate: str
    """PEM file with the certificate of this process."""
    key: str
    """PEM file with its private key."""
    ca: str
    """PEM file with the authorities whose certificates are accepted."""
    server_name: str | None = None
    """The name in the peers' certificates. Default: the address that is connected to."""
