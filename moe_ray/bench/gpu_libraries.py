"""Other libraries' products of 4-bit weights, for the kernel table of `bench gpu`: the same codes, timed beside ours.

Each has one scale for each group of inputs, of 16 bits. What none of them has, an order of columns or levels, is not
asked of them. Marlin is not among them: its kernels are built for a card and load nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Protocol, TypeVar

import torch
import torch.nn.functional as F

from moe_ray.core import ExpertKey
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.formats.grouped import MIDDLE, GroupedCodes
from moe_ray.model.weights import matrices_of_expert

Answer = TypeVar("Answer")
K_TILES: Final = 8
"""Of torch's packing: blocks of 16 inputs that lie together; 2, 4 or 8."""


class LibraryLacks(Exception):
    """A library is not installed, or refuses. Raised and caught in the bench."""


@dataclass(frozen=True, slots=True)
class Product:
    """x [T, K] W^T of one weight, and what it holds."""

    run: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int


class ProductLibrary(Protocol):
    """One library that multiplies by 4-bit weights."""

    @property
    def name(self) -> str:
        """With its version. Raises `LibraryLacks` where it is not installed."""
        ...

    def product(self, weight: GroupedCodes, device: torch.device) -> Product:
        """Pack a weight. Raises whatever the library raises."""
        ...


@dataclass(frozen=True, slots=True)
class TorchInt4:
    """torch's own: `_weight_int4pack_mm` on a card, for bfloat16; on a CPU its namesake for CPUs."""

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} _weight_int4pack_mm"

    def product(self, weight: GroupedCodes, device: torch.device) -> Product:
        """A code c stands for (c - 8) * scale + zero; of two codes in a byte the first is the high half."""
        codes = torch.from_numpy(weight.codes).to(device)
        scales = torch.from_numpy(weight.scales).to(device)
        zeros = torch.zeros_like(scales) if weight.offsets is None else torch.from_numpy(weight.offsets).to(device)
        groups = torch.stack((scales, zeros), 2).transpose(0, 1).contiguous().to(torch.bfloat16)  # [G, N, 2]
        if device.type == "cuda":
            packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], K_TILES)
            multiply = torch._weight_int4pack_mm
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), K_TILES)
            multiply = torch._weight_int4pack_mm_for_cpu
        group = weight.grouping.group

        def run(x: torch.Tensor) -> torch.Tensor:
            return multiply(x.to(torch.bfloat16), packed, group, groups).to(x.dtype)

        return Product(run, packed.nbytes + groups.nbytes)


@dataclass(frozen=True, slots=True)
class Gemlite:
    """gemlite's products in Triton, tuned by itself at the first calls; it needs a card to be imported."""

    @property
    def name(self) -> str:
        return f"gemlite {_version('gemlite')}"

    def product(self, weight: GroupedCodes, device: torch.device) -> Product:
        """A code c stands for (c - zero) * scale."""
        from gemlite.helper import A16W4_HQQ_INT

        scales = torch.from_numpy(weight.scales).to(device)
        zeros = torch.full_like(scales, MIDDLE[4])
        if weight.offsets is not None:
            zeros -= torch.from_numpy(weight.offsets).to(device) / scales
        codes = torch.from_numpy(weight.codes).to(device)
        linear = A16W4_HQQ_INT(device=str(device), dtype=torch.float16).from_weights(codes, scales.half(), zeros.half())

        def run(x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = linear(x.half())
            return made.to(x.dtype)

        return Product(run, sum(each.nbytes for each in (linear.W_q, linear.scales, linear.zeros)))


LIBRARIES: Final[tuple[ProductLibrary, ...]] = (TorchInt4(), Gemlite())


class LibraryExpert:
    """An expert of a checkpoint by a library's products: `base.FFN.forward` alone."""

    def __init__(self, library: ProductLibrary, checkpoint: Checkpoint, key: ExpertKey, device: torch.device) -> None:
        """Raises `LibraryLacks` with the library's own words where it refuses."""
        weights = [checkpoint.matrix(each).codes() for each in matrices_of_expert(checkpoint.config, *key)]
        self._library = library.name
        self._products: Sequence[Product] = self._asked(lambda: [library.product(each, device) for each in weights])
        self.nbytes = sum(each.nbytes for each in self._products)

    def forward(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The expert's output for rows [T, D], each times its weight [T]. Raises `LibraryLacks`."""
        gate, up, down = self._products

        def made() -> torch.Tensor:
            with torch.inference_mode():
                return down.run(F.silu(gate.run(rows)) * up.run(rows)) * weights[:, None].to(rows.dtype)

        return self._asked(made)

    def _asked(self, what: Callable[[], Answer]) -> Answer:
        """What a library answers. It may refuse with any exception: none of ours is in its way."""
        try:
            return what()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LibraryLacks(f"{self._library}: {reason}") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise LibraryLacks(f"{package}: not installed (pip install {package})") from None
