"""How an `ExpertCall` travels: one interface (`base`), one file per carrier, one literal table. Imports no carrier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from moe_ray.errors import ConfigError
from moe_ray.transport.base import MAILBOX_ADDRESS, LinkOptions
from moe_ray.transport.checks import check_carrier

if TYPE_CHECKING:
    from moe_ray.core import ReplicaInfo
    from moe_ray.transport.base import Link


def _local(info: ReplicaInfo, options: LinkOptions) -> Link:
    from moe_ray.transport.local import connect_local

    return connect_local(info)


def _socket(info: ReplicaInfo, options: LinkOptions) -> Link:
    if options.mailboxes is not None and MAILBOX_ADDRESS in info.addresses:
        by_card = options.mailboxes.link_to(info, options)
        if by_card is not None:
            return by_card
    if options.native_dir is not None and options.tls is None:
        from moe_ray.transport.native_socket import NativeSocketLink, links_library

        library = links_library(options.native_dir)
        if library is not None:
            return NativeSocketLink(info, options, library)
    from moe_ray.transport.socket import SocketLink

    return SocketLink(info, options)


def _grpc(info: ReplicaInfo, options: LinkOptions) -> Link:
    from moe_ray.transport.grpc import GrpcLink

    return GrpcLink(info, options)


def _ray(info: ReplicaInfo, options: LinkOptions) -> Link:
    from moe_ray.transport.ray import RayLink

    return RayLink(info, options)


_CONNECT: Mapping[str, Callable[[ReplicaInfo, LinkOptions], Link]] = {  # fastest first: the order of `auto`
    "local": _local,
    "socket": _socket,
    "grpc": _grpc,
    "ray": _ray,
}
CARRIERS = tuple(_CONNECT)


def connect(carrier: str, info: ReplicaInfo, options: LinkOptions | None = None) -> Link:
    """Open a link to the replica over `carrier`; blocks at most `connect_timeout_s`. Thread-safe.

    Raises `ConfigError` for an unknown carrier or one that the replica does not offer, `LinkBroken` when it does
    not answer.
    """
    return _CONNECT[check_carrier(carrier, CARRIERS)](info, options or LinkOptions())


def best_carrier(info: ReplicaInfo, allowed: tuple[str, ...] = CARRIERS) -> str:
    """Return the fastest of the `allowed` carriers that reaches the replica; raise `ConfigError` if none does."""
    for name in allowed:
        check_carrier(name, CARRIERS)
    for name in CARRIERS:
        if name in allowed and name in info.addresses and (name != "local" or _in_this_process(info)):
            return name
    raise ConfigError(
        f"expert replica {info.replica_id} offers {', '.join(sorted(info.addresses)) or 'no carrier'}, "
        f"and this process may use {', '.join(allowed) or 'none'}"
    )


def _in_this_process(info: ReplicaInfo) -> bool:
    from moe_ray.transport.local import serves

    return serves(info.addresses["local"])
