"""What a replica says of itself, as plain data for Ray's metadata and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe_ray.core import ReplicaInfo


def packed(info: ReplicaInfo) -> dict[str, Any]:
    """Info → data."""
    sets = {"keys": sorted(info.keys), "adapters": sorted(info.adapters)}
    return {**asdict(info), **sets, "addresses": dict(info.addresses)}


def unpacked(data: Mapping[str, Any]) -> ReplicaInfo:
    """Data → info, whether or not it went through JSON. Raises `TypeError`, `KeyError`, `ValueError` on other data."""
    keys = frozenset((layer, expert) for layer, expert in data["keys"])
    faults = {int(adapter_id): why for adapter_id, why in data["adapter_faults"].items()}
    return ReplicaInfo(**{**data, "keys": keys, "adapters": frozenset(data["adapters"]), "adapter_faults": faults})
