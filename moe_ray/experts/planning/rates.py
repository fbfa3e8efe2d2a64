"""How fast a device computes parts of a step: cards from their data sheets, CPUs as measured, emulated experts as told.

Times of products follow the roofline (Williams et al. 2009, CACM 52(4)): reading the weights or computing with them,
whichever takes longer. Measured devices have curves instead: what a product took at several numbers of rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

READ_SHARE: Final = 0.7
"""Assumed of cards: the share of the data sheet's bandwidth that products of few rows reach. Not measured."""
COMPUTE_SHARE: Final = 0.5
"""Assumed of cards: the share of the data sheet's dense FLOP/s that products of many rows reach. Not measured."""
CARD_LAYER_US: Final = 60.0
"""Assumed of cards: launching a layer's kernels of the trunk, beside what they compute. Not measured."""
CARD_CALL_US: Final = 25.0
"""Assumed of cards: launching one expert's kernels and copying its rows. Not measured."""
CARD_STEP_US: Final = 1500.0
"""Assumed: scheduling and sampling of a step. Not measured on a card."""
CARRIER_US: Final = 100.0
"""Of a scatter to processes with cores of their own, and its gather, over sockets (docs/measurements.md, Transport: 103
us for one replica)..."""
CARRIER_CALL_US: Final = 20.0
"""...and each further call (282 us for eight, on two cores)."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds that software takes beside products: base + per_call * calls + per_row * rows."""

    base_us: float = 0.0
    per_call_us: float = 0.0
    per_row_us: float = 0.0

    def seconds(self, calls: float, rows: float) -> float:
        return (self.base_us + self.per_call_us * calls + self.per_row_us * rows) / 1e6


@dataclass(frozen=True, slots=True)
class Curve:
    """Nanoseconds that a product takes for each weight of its matrix, by rows."""

    rows: tuple[float, ...]
    """Ascending."""
    ns_per_weight: tuple[float, ...]

    def at(self, rows: float) -> float:
        """Between two measured points a straight line; beyond the last as many more as there are rows.

        >>> Curve((1, 4), (2.0, 5.0)).at(2), Curve((1, 4), (2.0, 5.0)).at(8), Curve((1, 4), (2.0, 5.0)).at(0.5)
        (3.0, 10.0, 2.0)
        """
        if rows <= self.rows[0]:
            return self.ns_per_weight[0]
        if rows >= self.rows[-1]:
            return self.ns_per_weight[-1] * rows / self.rows[-1]
        above = bisect_left(self.rows, rows)
        low, high = self.rows[above - 1], self.rows[above]
        share = (rows - low) / (high - low)
        return self.ns_per_weight[above - 1] * (1 - share) + self.ns_per_weight[above] * share


class DeviceRates(Protocol):
    """What a device takes for the parts of a step, in seconds."""

    @property
    def lanes(self) -> int:
        """Experts' calls that it computes side by side, each in a process of its own: the cores of a CPU."""
        ...

    def trunk_s(self, form: str, weights: int, nbytes: int, rows: float) -> float:
        """A product of the trunk with a matrix of so many weights, held in `form`."""
        ...

    def expert_s(self, form: str, weights: int, nbytes: int, rows: float, at_once: int) -> float:
        """One expert of one layer, while `at_once` calls are computed; 0: in the trunk's process, by all cores."""
        ...

    def attention_s(self, pairs: float, width: int, head_dim: int, kv_bytes: float) -> float:
        """Attention of one layer: `pairs` of tokens and those they attend to, heads of queries of `width` together."""
        ...

    def layer_overhead(self, spread: bool) -> Overhead:
        """Of one layer's software; `spread`: with experts in other processes of this host."""
        ...

    def step_overhead(self) -> Overhead:
        """Of one step's software; its rows are the sequences."""
        ...


@dataclass(frozen=True, slots=True)
class DataSheet:
    """Rates of a card, or of a CPU that nobody has measured: the roofline of its data sheet, with assumed shares."""

    read_gb_s: float
    tflops: Mapping[str, float]
    """Dense, by dtype: float16, bfloat16, float32, and int8 where it has it."""
    cores: int = 1
    """Of a CPU, which experts' processes share; a card computes its actors' calls one after the other."""
    is_cpu: bool = False

    @property
    def lanes(self) -> int:
        return self.cores

    @property
    def float_form(self) -> str:
        """The 16-bit dtype that it computes in: bfloat16, or float16 where it has no bfloat16."""
        return "bfloat16" if "bfloat16" in self.tflops else "float16"

    def _product_s(self, form: str, weights: int, nbytes: int, rows: float, share: float = 1.0) -> float:
        rate = self.tflops.get(form) or self.tflops.get(self.float_form) or self.tflops["float32"]
        read = nbytes / (READ_SHARE * self.read_gb_s * 1e9)
        return max(read, 2 * weights * rows / (COMPUTE_SHARE * rate * 1e12)) / share

    def trunk_s(self, form: str, weights: int, nbytes: int, rows: float) -> float:
        return self._product_s("float32" if form == "float32" else self.float_form, weights, nbytes, rows)

    def expert_s(self, form: str, weights: int, nbytes: int, rows: float, at_once: int) -> float:
        """Codes are decoded to floats for the products: they save reading, not computing."""
        share = 1 / max(1, min(at_once, self.cores)) if self.cores > 1 and at_once else 1.0
        return self._product_s("float32" if form == "float32" else self.float_form, weights, nbytes, rows, share)

    def attention_s(self, pairs: float, width: int, head_dim: int, kv_bytes: float) -> float:
        return self._product_s(self.float_form, round(2 * pairs * width), round(kv_bytes), 1.0)

    def layer_overhead(self, spread: bool) -> Overhead:
        call_us = 0.0 if self.is_cpu else CARD_CALL_US
        if spread:  # experts' kernels are launched side by side
            return Overhead(CARD_LAYER_US + CARRIER_US + call_us, CARRIER_CALL_US)
        return Overhead(CARD_LAYER_US, call_us)

    def step_overhead(self) -> Overhead:
        return Overhead(CARD_STEP_US)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of this machine's CPU, as `bench.machine_probe` measured them."""

    cores: int
    experts: Mapping[str, tuple[Curve, Curve, Curve]]
    """By form: one call in a process of one thread; as many calls as cores, so; one call computed by all cores."""
    trunk: Mapping[str, Curve]
    """By form, by all cores."""
    attention_ns: Mapping[int, float]
    """Head dimension -> nanoseconds for each pair of tokens and number of a query's heads, by all cores."""
    local: Overhead
    """Of a layer with the experts in the trunk's process."""
    spread: Overhead
    """Of a layer with each expert in a process of its own, over sockets."""
    step: Overhead

    @property
    def lanes(self) -> int:
        return self.cores

    def trunk_s(self, form: str, weights: int, nbytes: int, rows: float) -> float:
        known, times = _known(form)
        return times * weights * self.trunk[known].at(rows) / 1e9

    def expert_s(self, form: str, weights: int, nbytes: int, rows: float, at_once: int) -> float:
        known, times = _known(form)
        alone, crowded, pooled = self.experts[known]
        curve = pooled if at_once == 0 else alone if at_once == 1 else crowded
        return times * weights * curve.at(rows) / 1e9

    def attention_s(self, pairs: float, width: int, head_dim: int, kv_bytes: float) -> float:
        nearest = min(self.attention_ns, key=lambda dim: abs(dim - head_dim))
        return pairs * width * self.attention_ns[nearest] / 1e9

    def layer_overhead(self, spread: bool) -> Overhead:
        return self.spread if spread else self.local

    def step_overhead(self) -> Overhead:
        return self.step


def _known(form: str) -> tuple[str, float]:
    """The form that was measured in the place of `form`, and how many times as long it takes: as it has more bytes."""
    return ("bfloat16", 2.0) if form == "float32" else ("bfloat16", 1.0) if form == "float16" else (form, 1.0)


@dataclass(frozen=True, slots=True)
class ToldRates:
    """Rates of an emulated expert: a call takes the time that is told, and nothing else does."""

    fixed_us: float
    per_row_us: float
    trunk_us: float = 0.0
    """Of the trunk, before each layer's calls."""
    carrier: Overhead = Overhead()
    lanes: int = 1

    def trunk_s(self, form: str, weights: int, nbytes: int, rows: float) -> float:
        return 0.0

    def expert_s(self, form: str, weights: int, nbytes: int, rows: float, at_once: int) -> float:
        return (self.fixed_us + self.per_row_us * rows) / 1e6

    def attention_s(self, pairs: float, width: int, head_dim: int, kv_bytes: float) -> float:
        return self.trunk_us / 1e6

    def layer_overhead(self, spread: bool) -> Overhead:
        return self.carrier if spread else Overhead()

    def step_overhead(self) -> Overhead:
        return Overhead()
