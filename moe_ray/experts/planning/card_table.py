"""Well-known cards: memory, bandwidth and dense arithmetic, by the maker's data sheets.

Sources: NVIDIA's data sheets of the Tesla P100, V100, T4, A10, A100, L4, L40S, H100, H200 and RTX A6000, and the white
papers of Pascal to Blackwell (RTX cards: tensor cores that add up in float32). A10G: half of A10's arithmetic, as AWS
states it. H20, B200: as their servers' makers state them. SXM where a card comes in several forms. Figures are without
sparsity; a card without bfloat16 computes in float16. None of them was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moe_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CardSheet:
    """One card's data sheet."""

    gib: int
    read_gb_s: float
    float32: float
    """TFLOP/s, as all that follow."""
    float16: float
    bfloat16: float | None
    """None: it has no instructions for it."""
    int8: float | None = None

    def tflops(self) -> dict[str, float]:
        """By dtype, those that it has."""
        every = {"float32": self.float32, "float16": self.float16, "bfloat16": self.bfloat16, "int8": self.int8}
        return {name: rate for name, rate in every.items() if rate is not None}


CARD_SHEETS: Final[dict[str, CardSheet]] = {
    "P100-16GB": CardSheet(16, 732, 10.6, 21.2, None),
    "V100-16GB": CardSheet(16, 900, 15.7, 125, None),
    "V100-32GB": CardSheet(32, 900, 15.7, 125, None),
    "T4-16GB": CardSheet(16, 320, 8.1, 65, None, 130),
    "RTX3060-12GB": CardSheet(12, 360, 12.7, 25.5, 25.5, 102),
    "RTX3090-24GB": CardSheet(24, 936, 35.6, 71, 71, 284),
    "RTX4090-24GB": CardSheet(24, 1008, 82.6, 165, 165, 660),
    "RTX5090-32GB": CardSheet(32, 1792, 104.8, 209, 209, 838),
    "RTXA6000-48GB": CardSheet(48, 768, 38.7, 155, 155, 310),
    "A10-24GB": CardSheet(24, 600, 31.2, 125, 125, 250),
    "A10G-24GB": CardSheet(24, 600, 31.5, 70, 70, 140),
    "L4-24GB": CardSheet(24, 300, 30.3, 121, 121, 242),
    "L40S-48GB": CardSheet(48, 864, 91.6, 362, 362, 733),
    "A100-40GB": CardSheet(40, 1555, 19.5, 312, 312, 624),
    "A100-80GB": CardSheet(80, 2039, 19.5, 312, 312, 624),
    "H20-96GB": CardSheet(96, 4000, 44, 148, 148, 296),
    "H100-80GB": CardSheet(80, 3350, 67, 989, 989, 1979),
    "H200-141GB": CardSheet(141, 4800, 67, 989, 989, 1979),
    "B200-180GB": CardSheet(180, 8000, 80, 2250, 2250, 4500),
}

CORE_READ_GB_S: Final = 10.0
"""Assumed of a CPU that nobody has measured: what each core reads..."""
HOST_READ_GB_S: Final = 150.0
"""...and all of a host together."""
CORE_TFLOPS: Final = 0.2
"""Assumed of each core in 16-bit floats, of which half counts: AVX2 kernels reach 0.13 (docs/measurements.md, Kernels:
128 rows of 7.3 M weights in 14.6 ms)."""
CORE_GIB: Final = 4.0
"""Memory of a host for each core, unless it is told."""


def card_named(name: str) -> tuple[str, CardSheet]:
    """A card's full name and sheet, by its name with or without its memory. Raises `ConfigError` with the list.

    >>> card_named("t4")[0], card_named("A100-80G")[0], card_named("RTX 4090")[0]
    ('T4-16GB', 'A100-80GB', 'RTX4090-24GB')
    """
    wanted = name.upper().replace("NVIDIA ", "").replace(" ", "").replace("RTX-", "RTX").replace("GIB", "GB")
    wanted = wanted + "B" if wanted.endswith("G") and wanted[-2:-1].isdigit() and "-" in wanted else wanted
    if wanted in CARD_SHEETS:
        return wanted, CARD_SHEETS[wanted]
    found = [known for known in CARD_SHEETS if known.partition("-")[0] == wanted]
    if len(found) == 1:
        return found[0], CARD_SHEETS[found[0]]
    said = f"{name!r} may be {' or '.join(found)}" if found else f"no card is known as {name!r}"
    raise ConfigError(f"{said}; known cards: {', '.join(CARD_SHEETS)}; others by a file (--fleet FILE.yaml)")


KINDS_WITHOUT_BFLOAT16: Final = frozenset({"K80", "P4", "P100", "V100", "T4"})
"""By Ray's name of the card: those of compute capability below 8.0."""


def sheet_of(kind: str | None, memory_bytes: int | None) -> CardSheet | None:
    """The data sheet of a card by Ray's name of it: where cards of one name come in several sizes, the nearest.

    None: it has none here.

    >>> sheet_of("V100", 32 * 2**30).gib, sheet_of("A100-80G", None).read_gb_s, sheet_of("K80", None)
    (32, 2039, None)
    """
    name, _, size = (kind or "").replace("RTX-", "RTX").partition("-")
    found = [sheet for known, sheet in CARD_SHEETS.items() if known.partition("-")[0] == name]
    gib = int(size[:-1]) if size.endswith("G") and size[:-1].isdigit() else (memory_bytes or 0) / 2**30
    return min(found, key=lambda sheet: abs(sheet.gib - gib), default=None)


def has_bfloat16(kind: str | None) -> bool:
    """Whether a card computes in bfloat16, by Ray's name of it; of a kind that is not known, that it does."""
    return kind not in KINDS_WITHOUT_BFLOAT16
