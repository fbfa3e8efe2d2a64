"""The model families that are served: a file and a row each."""

from __future__ import annotations

from typing import Final

from moe_ray.model.families.family import ConfigKeys, ExpertRole, Family, Layout, Role, Router, TrunkRole, Weight
from moe_ray.model.families.mixtral import MIXTRAL

__all__ = ["FAMILIES", "ConfigKeys", "ExpertRole", "Family", "Layout", "Role", "Router", "TrunkRole", "Weight"]

FAMILIES: Final[dict[str, Family]] = {row.model_type: row for row in (MIXTRAL,)}
"""By config.json's model_type."""
