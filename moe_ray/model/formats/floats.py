"""Weights as plain floats: one tensor each, `weight`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.model.formats.weight_format import Place, Source, StoredWeight, sole_tensor

if TYPE_CHECKING:
    import numpy as np
    import torch

SUFFIX: Final = "weight"


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """`WeightFormat` of one float dtype."""

    name: str
    """torch's and numpy's (with ml_dtypes) name of the dtype."""
    stored: str
    """safetensors' name of it."""
    item_bytes: int

    def names(self, place: Place) -> tuple[str, ...]:
        return (place.named(SUFFIX),)

    def find(self, place: Place, shape: tuple[int, ...], source: Source) -> StoredWeight | None:
        (name,) = self.names(place)
        lies = shape[::-1] if place.transposed else shape
        whole = place.whole(shape)
        if place.transposed:
            whole = (whole[0], *whole[:0:-1])
        if not sole_tensor(name, self.stored, whole, source):
            return None
        part = place.tensor_part(name, self.stored, lies, self.nbytes(shape))
        return StoredWeight(self.name, shape, (part,), transposed=place.transposed)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of this shape, in a checkpoint and in memory."""
        return math.prod(shape) * self.item_bytes

    def decode(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> np.ndarray:
        (values,) = arrays
        return values.T if stored.transposed else values.reshape(stored.shape)

    def codes(self, stored: StoredWeight, arrays: Sequence[np.ndarray]) -> None:
        return

    def pack(self, place: Place, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors to write for a weight with a place of its own. `find` and `decode` give its values back."""
        import torch

        return {place.named(SUFFIX): values.to(getattr(torch, self.name)).contiguous()}
