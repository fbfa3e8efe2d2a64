"""The `tls` section: certificates of expert and trunk ports."""

from __future__ import annotations

from moe_ray.config.section import Section


class TlsSection(Section):
    """PEM files for mutual TLS on expert and trunk ports."""

    certificate: str
    key: str
    ca: str
    server_name: str | None = None
    """The name in the certificates, where peers are addressed by IP."""
