"""What a weight may be held as in memory: a float dtype, or codes with a scale for each group of inputs.

What a checkpoint stores it as is another matter (`FORMATS` of `formats`): a weight is quantised while it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from moe_ray.errors import ConfigError
from moe_ray.model.families import Role
from moe_ray.model.formats import FLOATS
from moe_ray.model.formats.grouped import Grouping
from moe_ray.model.formats.rounding import NF4

Quantization = Literal["int8", "int4", "nf4"]
"""What experts or the trunk may be quantised to on load."""
QUANTIZATIONS: Final[tuple[str, ...]] = get_args(Quantization)

GROUPINGS: Final[dict[str, Grouping]] = {
    "int8": Grouping(bits=8, group=128),
    "int4": Grouping(bits=4, group=32),
    "nf4": Grouping(bits=4, group=64, levels=NF4),
}
"""By name, one for each of `QUANTIZATIONS`. Where a group does not divide a row, it is smaller: see `grouping`."""
LEAST_GROUP: Final = 32
"""Kernels compute on groups of a multiple of it, or of a whole row."""

QUANTISED_ROLES: Final[frozenset[Role]] = frozenset(
    {"gate", "up", "down", "q", "k", "v", "out", "head", "shared_gate", "shared_up", "shared_down"}
)
"""Weights that a quantised expert or trunk holds as codes.

Gates, norms and embeddings stay floats, and so does the head of a model whose embedding is its head.
"""


def grouping(name: str, inputs: int) -> Grouping | None:
    """How a weight [N, inputs] is held as `name`; None: as floats of that dtype. Raises `ConfigError` for other names.

    Where the format's group does not divide a row, its half does, and so on down to `LEAST_GROUP`; else the row is one
    group.

    >>> grouping("int8", 4096).group, grouping("int8", 576).group, grouping("int8", 80).group
    (128, 64, 80)
    """
    if name in FLOATS:
        return None
    if name not in GROUPINGS:
        raise ConfigError(f"a weight cannot be held as {name!r}, allowed: {', '.join((*FLOATS, *GROUPINGS))}")
    how = GROUPINGS[name]
    group = how.group
    while inputs % group and group > LEAST_GROUP:
        group //= 2
    return replace(how, group=group if inputs % group == 0 else inputs)


def nbytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes in memory of a weight held as `name`, scales with it."""
    how = grouping(name, shape[-1])
    if how is None:
        return FLOATS[name].nbytes(shape)
    return how.nbytes((math.prod(shape[:-1]), shape[-1]))


@dataclass(frozen=True, slots=True)
class HeldAs:
    """What the weights of one actor are held as."""

    dtype: str
    """Of what stays floats, and of rows: a float dtype."""
    quantization: str | None = None
    """Of `QUANTISED_ROLES`; None: they are held in `dtype` as well."""

    def of(self, role: Role) -> str:
        """The name by which a weight of this role is held: of a float dtype, or of `GROUPINGS`."""
        return self.dtype if self.quantization is None or role not in QUANTISED_ROLES else self.quantization

    def nbytes(self, role: Role, shape: tuple[int, ...]) -> int:
        """Bytes in memory of a weight of this role."""
        return nbytes(self.of(role), shape)
