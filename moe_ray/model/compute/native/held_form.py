"""How the native kernels hold weights: in the bits that a checkpoint stores, in fewer, or as floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.formats import FLOATS
from moe_ray.model.formats.grouped import GroupedCodes, Grouping
from moe_ray.model.formats.held import grouping
from moe_ray.native.codes import block_shape, lacks, pack_codes, round_codes
from moe_ray.native.host import DTYPE_CODES
from moe_ray.native.kernels import BlockShape, Kernels, Packed

if TYPE_CHECKING:
    import numpy as np

    from moe_ray.model.matrix import Matrix

FEW_BITS: Final = 7.0
"""What is stored in no more than so many bits, and no kernel computes on, is held in 8 bits, not as floats."""


@dataclass(frozen=True, slots=True)
class HeldForm:
    """How one block of matrices is held. Decided before anything is read."""

    dtype: str
    """Of floats."""
    grouping: Grouping | None = None
    """Of codes; None: floats are held."""
    as_stored: bool = False
    """Whether the checkpoint's codes are taken as they are."""
    converted: str = ""
    """The format of quantised weights that no kernel computes on; empty where nothing was converted."""
    wide_inputs: bool = False
    """Whether inputs of 8-bit codes have 16 bits on every CPU."""

    def __str__(self) -> str:
        converted = f" (converted from {self.converted})" if self.converted else ""
        if self.grouping is None:
            return f"{self.dtype}{converted}"
        if self.grouping.float8 is not None:
            return f"fp8 {self.grouping.float8} in groups of {self.grouping.group}"
        table = " by table" if self.grouping.levels else ""
        offsets = " with offsets" if self.grouping.offsets else ""
        return f"int{self.grouping.bits}{table} in groups of {self.grouping.group}{offsets}{converted}"

    def block(self, shape: tuple[int, int], count: int) -> BlockShape:
        """The shape of the block for `count` matrices [N, K] of it."""
        if self.grouping is None:
            return BlockShape(DTYPE_CODES[self.dtype], *shape, count)
        return block_shape(self.grouping, *shape, count, self.wide_inputs)


def form_of(
    matrices: Sequence[Matrix],
    dtype: str,
    quantize: str | None = None,
    wide_inputs: bool = False,
    lacking: Callable[[Grouping], str] = lacks,
) -> HeldForm:
    """How matrices of one block are held: quantised to `quantize`, or as stored where kernels compute on that.

    Weights that are stored in no more bits than `quantize` stay as they are. What no kernel computes on is converted:
    to 8 bits if it is stored in few, else to floats of `dtype`. `lacking`: why kernels cannot compute on codes; empty
    where they can.
    """
    stored = {matrix.grouping for matrix in matrices}
    common = next(iter(stored)) if len(stored) == 1 else None
    usable = common is not None and not lacking(common)
    inputs = matrices[0].shape[1]
    wanted = None if quantize is None else grouping(quantize, inputs)
    if common is not None and usable and (wanted is None or common.bits <= wanted.bits):
        return HeldForm(dtype, common, as_stored=True, wide_inputs=wide_inputs)
    if wanted is None and max(matrix.bits for matrix in matrices) <= FEW_BITS:
        wanted = grouping("int8", inputs)
    quantised = [matrix.format for matrix in matrices if matrix.format not in FLOATS]
    converted = quantised[0] if quantised and quantize is None else ""
    return HeldForm(dtype, wanted, converted=converted, wide_inputs=wide_inputs)


def hold(kernels: Kernels, form: HeldForm, *matrices: Sequence[Matrix]) -> Packed:
    """Read matrices and pack them into one block. Each is given as weights [N, K] that lie one above the other.

    Raises `CheckpointError` for what cannot be read, and for columns in different orders.
    """
    how = form.grouping
    if how is None:
        return kernels.pack_floats(form.dtype, *(_floats(rows, form.dtype) for rows in matrices))
    if form.as_stored:
        weights = _of_one_order([[matrix.codes() for matrix in rows] for rows in matrices])
    else:
        weights = [_stacked([_rounded(kernels, matrix, how) for matrix in rows]) for rows in matrices]
    return pack_codes(kernels, *weights, wide_inputs=form.wide_inputs)


def _floats(rows: Sequence[Matrix], dtype: str) -> np.ndarray:
    import ml_dtypes  # noqa: F401 - tells numpy what bfloat16 is
    import numpy as np

    parts = [matrix.values().astype(np.dtype(dtype), copy=False) for matrix in rows]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rounded(kernels: Kernels, matrix: Matrix, how: Grouping) -> GroupedCodes:
    return GroupedCodes(how, *round_codes(kernels, matrix.values(), how))


def check_one_order(weights: Sequence[GroupedCodes]) -> None:
    """Raise `CheckpointError` where weights that share their inputs have their columns in different orders."""
    import numpy as np

    order = weights[0].order
    for weight in weights:
        if order is not None and weight.order is not None and not np.array_equal(order, weight.order):
            raise CheckpointError(
                "quantised weights that share their inputs have their columns in different orders (act-order of "
                "another calibration); kernels need one order: set model.kernels to torch"
            )


def _of_one_order(matrices: Sequence[Sequence[GroupedCodes]]) -> list[GroupedCodes]:
    check_one_order([weight for rows in matrices for weight in rows])
    return [_stacked(rows) for rows in matrices]


def _stacked(rows: Sequence[GroupedCodes]) -> GroupedCodes:
    """Weights of one grouping and order, one above the other."""
    import numpy as np

    first = rows[0]
    if len(rows) == 1:
        return first
    offsets = [weight.offsets for weight in rows if weight.offsets is not None]
    return GroupedCodes(
        first.grouping,
        np.concatenate([weight.codes for weight in rows]),
        np.concatenate([weight.scales for weight in rows]),
        np.concatenate(offsets) if offsets else None,
        first.order,
    )
