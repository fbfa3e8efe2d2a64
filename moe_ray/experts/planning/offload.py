"""Which layers of an expert stay in the host's memory, and what it costs to copy them to the card. Pure data.

Layers that are not on the card are copied into one of two buffers there, in turns: the next while one is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from moe_ray.core import ExpertKey
from moe_ray.errors import ConfigError

BUFFERS: Final = 2
"""On the card: one is computed with, the next layer is copied into the other."""
PCIE_GB_S: Final = 15.75
"""PCIe 3.0 x16 in one direction, as of T4 and V100: 8 GT/s, 16 lanes, 128 of 130 bits (PCI-SIG's specification)."""
PCIE_SHARE: Final = 0.8
"""Assumed: the share of that which copies from pinned memory reach. Not measured."""


@dataclass(frozen=True, slots=True)
class HostShare:
    """What of an actor's weights is in the host's memory, in bytes; 0: all is on its card."""

    host_bytes: int = 0
    buffer_bytes: int = 0
    """On the card, for copies of it."""

    def on_card(self, weight_bytes: int) -> int:
        """What of so many bytes of weights is on the card, buffers included."""
        return weight_bytes - self.host_bytes + self.buffer_bytes

    @property
    def copy_s(self) -> float:
        """Seconds that copying all of it takes once: in a step, at most, where each layer is called once."""
        return self.host_bytes / (PCIE_GB_S * PCIE_SHARE * 1e9)


ON_CARD: Final = HostShare()
"""Nothing is in the host's memory."""


def host_share(layer_bytes: int, layers: int, offload_bytes: int, sharers: int = 1) -> HostShare:
    """What stays in the host's memory if that is to be `offload_bytes` at least. Raises `ConfigError` as `streamed`."""
    count = _count(layer_bytes, layers, offload_bytes, sharers)
    return HostShare(count * layer_bytes, BUFFERS * layer_bytes if count else 0)


def streamed(
    keys: Sequence[ExpertKey],
    layer_bytes: int,
    offload_bytes: int,
    loads: Mapping[ExpertKey, float] | None = None,
    sharers: int = 1,
) -> tuple[ExpertKey, ...]:
    """The keys of `keys`, of so many bytes each, that stay in the host's memory, ascending; () for no offload.

    Those with the least of a recorded load, rows by key; without one they are spread evenly, so that the layers between
    two of them are computed while the second is copied. `sharers`: so many experts of one process have as much there,
    and share the buffers. Raises `ConfigError` where nothing is saved, because the buffers on the card take as much.

    >>> streamed([(layer, 0) for layer in range(8)], 10, 35)
    ((1, 0), (3, 0), (5, 0), (7, 0))
    """
    ordered = sorted(keys)
    count = _count(layer_bytes, len(ordered), offload_bytes, sharers)
    if loads is not None:
        return tuple(sorted(sorted(ordered, key=lambda key: (loads.get(key, 0.0), -key[0], key[1]))[:count]))
    return tuple(ordered[(number + 1) * len(ordered) // count - 1] for number in range(count))


def _count(layer_bytes: int, layers: int, offload_bytes: int, sharers: int) -> int:
    """How many layers of each expert stay in the host's memory."""
    count = min(layers, ceil(offload_bytes / layer_bytes))
    if 0 < count * sharers <= BUFFERS:
        least = BUFFERS // sharers * layer_bytes / 2**30
        raise ConfigError(
            f"experts.cpu_offload_gib is {offload_bytes / 2**30:g}: {count} of {layers} layers of "
            f"{layer_bytes / 2**30:.3f} GiB would be in the host's memory, and {BUFFERS} buffers on the card take as "
            f"much; allowed are 0, or more than {least:.3f}"
        )
    return count
