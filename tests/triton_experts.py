"""Experts as Triton's kernels hold them, with what they give in float64: for the interpreter and for a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from moe_ray.model.compute.native.held_form import HeldForm
from moe_ray.model.compute.torch.expert import gated
from moe_ray.model.compute.triton.expert import ExpertWeights, TritonFFN
from moe_ray.model.compute.triton.reading import read_expert
from moe_ray.model.families import ClampedSwiGLU
from moe_ray.model.formats import GroupedCodes
from moe_ray.model.formats.grouped import Grouping, float8_values
from moe_ray.model.formats.rounding import NF4
from moe_ray.model.matrix import Matrix

TOLERANCE: Final = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
"""Of the largest value: of rounding rows, and what lies between the two products, to the dtype."""
ROWS: Final = (1, 2, 3, 7, 16, 17, 64, 65)


@dataclass(frozen=True, eq=False)
class Codes:
    """`Matrix` of codes in memory."""

    held: GroupedCodes
    format: str = "codes"

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape

    @property
    def grouping(self) -> Grouping:
        return self.held.grouping

    @property
    def bits(self) -> float:
        return float(self.held.grouping.bits)

    def values(self) -> np.ndarray:
        return self.held.values()

    def codes(self) -> GroupedCodes:
        return self.held


@dataclass(frozen=True, eq=False)
class Floats:
    """`Matrix` of float32 values in memory."""

    held: np.ndarray
    format: str = "float32"
    grouping: None = None
    bits: float = 32.0

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.held.shape
        return n, k

    def values(self) -> np.ndarray:
        return self.held

    def codes(self) -> GroupedCodes:
        raise AssertionError


@dataclass(frozen=True)
class Case:
    """What is held, and how it is combined."""

    name: str
    grouping: Grouping | None = None
    hidden: int = 96
    inner: int = 160
    biases: bool = False
    clamped: ClampedSwiGLU | None = None

    def __str__(self) -> str:
        return self.name


WHOLE: Final = -1
"""A group of a whole row."""


def codes_in(name: str, bits: int, group: int, hidden: int = 128, inner: int = 256, **how: object) -> Case:
    return Case(name, Grouping(bits, group, **how), hidden, inner)  # type: ignore[arg-type]


CASES: Final = (
    Case("floats"),
    Case("floats, sizes that are no multiples of anything", hidden=37, inner=75),
    Case("floats, clamped, with biases", biases=True, clamped=ClampedSwiGLU(1.5, 1.702)),
    codes_in("int8", 8, 128),
    codes_in("int8 in groups of 32 with offsets", 8, 32, 96, 160, offsets=True),
    codes_in("int8 by rows", 8, WHOLE, 80, 112),
    codes_in("int4", 4, 32, 96, 160),
    codes_in("int4 in groups of 64 with offsets and an order", 4, 64, offsets=True, reordered=True),
    codes_in("int4 in groups of 128 with an order", 4, 128, reordered=True),
    codes_in("int4 by rows with offsets", 4, WHOLE, 80, 112, offsets=True),
    codes_in("fp8 in blocks", 8, 64, float8="e4m3"),
    codes_in("fp8 by rows, sizes that are no multiples of anything", 8, WHOLE, 37, 75, float8="e4m3"),
    codes_in("fp8 e5m2 in groups of 32", 8, 32, 96, 160, float8="e5m2"),
    codes_in("nf4", 4, 64, levels=NF4),
    codes_in("4-bit floats in groups of 32", 4, 32, 96, 160, levels=tuple(float(x) for x in range(-6, 10))),
    replace(codes_in("int4, clamped, with biases", 4, 32, 96, 160), biases=True, clamped=ClampedSwiGLU(1.5, 1.702)),
)


class CaseExpert:
    """A random expert of a case, by Triton on a device, and what it gives in float64."""

    def __init__(self, case: Case, dtype: str, device: str = "cpu", seed: int = 0) -> None:
        self.case, self.dtype, self.device = case, getattr(torch, dtype), torch.device(device)
        random = np.random.default_rng(seed)
        hidden, inner = case.hidden, case.inner
        gate, up = (self._matrix(random, inner, hidden) for _ in range(2))
        if isinstance(gate, Codes) and isinstance(up, Codes):  # which share their inputs, and so their order
            up = Codes(replace(up.held, order=gate.held.order))
        down = self._matrix(random, hidden, inner)
        self.matrices: tuple[Matrix, Matrix, Matrix] = (gate, up, down)
        self.biases = [
            torch.from_numpy(random.standard_normal(n, dtype=np.float32)).to(self.dtype)
            for n in ((inner, inner, hidden) if case.biases else ())
        ]
        forms = tuple(HeldForm(dtype, each.grouping, as_stored=True) for each in (gate, down))
        self.weights: ExpertWeights = read_expert((forms[0], forms[1]), self.matrices, self.biases, self.device)
        self.ffn = TritonFFN(self.weights, case.clamped)

    def _matrix(self, random: np.random.Generator, n: int, k: int) -> Codes | Floats:
        scale, how = np.float32(k**-0.5), self.case.grouping
        if how is None:
            values = torch.from_numpy(random.standard_normal((n, k), dtype=np.float32) * scale)
            return Floats(values.to(self.dtype).float().numpy())
        if how.group == WHOLE:
            how = replace(how, group=k)
        groups = k // how.group
        codes = random.integers(0, 2**how.bits, (n, k), dtype=np.uint8)
        if how.float8 is not None:
            return Codes(self._float8(random, how, codes, scale))
        # Scales that have 11 bits, as those of checkpoints do: then weights are exactly what their codes say.
        scales = (random.uniform(0.5, 1.5, (n, groups)) * scale / 2 ** (how.bits - 2)).astype(np.float16)
        offsets = (random.standard_normal((n, groups)) * scale).astype(np.float16) if how.offsets else None
        order = random.permutation(k).astype(np.int32) if how.reordered else None
        if offsets is not None:
            offsets = offsets.astype(np.float32)
        return Codes(GroupedCodes(how, codes, scales.astype(np.float32), offsets, order))

    @staticmethod
    def _float8(random: np.random.Generator, how: Grouping, codes: np.ndarray, scale: np.float32) -> GroupedCodes:
        """Of all finite codes, subnormal ones and both zeros among them."""
        assert how.float8 is not None
        levels = float8_values(how.float8)
        codes = np.where(np.isfinite(levels)[codes], codes, 0).astype(np.uint8)
        n, k = codes.shape
        scale = scale / np.float32(levels[codes].std())
        return GroupedCodes(how, codes, random.uniform(0.5, 1.5, (n, k // how.group)).astype(np.float32) * scale)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [T, D] and their weights [T]."""
        seeded = torch.Generator().manual_seed(count)
        rows = torch.randn(count, self.case.hidden, generator=seeded).to(self.dtype)
        return rows.to(self.device), torch.rand(count, generator=seeded).to(self.device)

    def wanted(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The output in float64."""
        w1, w3, w2 = (torch.from_numpy(each.values()).double() for each in self.matrices)
        x = rows.cpu().double()
        of_gate, of_up, of_down = (each.double() for each in self.biases) if self.biases else (0.0, 0.0, 0.0)
        inner = gated(x @ w1.T + of_gate, x @ w3.T + of_up, "silu", self.case.clamped)
        return (inner @ w2.T + of_down) * weights.cpu().double()[:, None]

    def check(self, count: int) -> None:
        """So many rows give what they should."""
        rows, weights = self.rows(count)
        got = self.ffn.forward(rows, weights)
        assert got.dtype == rows.dtype
        wanted = self.wanted(rows, weights)
        tolerance = TOLERANCE[str(self.dtype).removeprefix("torch.")] * float(wanted.abs().max())
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=tolerance)

    def check_alone_and_in_company(self, count: int) -> None:
        """A row has the same bits by itself, and among others at any place."""
        rows, weights = self.rows(count)
        whole = self.ffn.forward(rows, weights)
        for start, end in ((0, 1), (count - 1, count), (3, 20)):
            assert torch.equal(self.ffn.forward(rows[start:end], weights[start:end]), whole[start:end])
        turned = self.ffn.forward(rows.flip(0), weights.flip(0))
        assert torch.equal(turned.flip(0), whole)
