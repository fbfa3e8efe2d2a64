"""What is asked of a quantisation, and what it is said to have done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from moe_ray.convert.quantize.integer_scheme import IntegerScheme
from moe_ray.convert.quantize.scheme import Scheme
from moe_ray.convert.quantize.ternary_scheme import TernaryScheme
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model.families import Weight
from moe_ray.model.formats import Grouping

Method = Literal["rtn", "gptq", "awq"]
TrunkBits = Literal["none", "int8", "int4"]
METHODS: Final = ("rtn", "gptq", "awq")
BITS: Final = (4, 8)
TERNARY_BITS: Final = (0.25, 1.6)
"""The fewest and the most in which weights are ternary."""
DEFAULT_GROUP: Final = 32
GROUP_SIZES: Final = (32, 64, 128)
TRUNK_BITS: Final[dict[str, int | None]] = {"none": None, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """How to quantise a model. Raises `ConfigError` on a value that is not allowed."""

    bits: float = 4
    """Of the experts' weights; between `TERNARY_BITS` they are ternary, of so many bits in the file."""
    group_size: int | None = None
    """None: `DEFAULT_GROUP`. A ternary weight has a scale for each row; the size is then that of the trunk's groups."""
    asymmetric: bool = False
    method: Method = "gptq"
    trunk: TrunkBits = "none"
    """Of the attention's four matrices. Gates, norms, embedding and head stay as they are."""
    calibration_text: Path | None = None
    """None: the built-in one."""
    calibration_tokens: int = 16384
    act_order: bool = False
    """GPTQ: the inputs that matter most first. Kernels then permute the inputs of each call."""
    shard_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ConfigError(f"quantize: `{name}` must be {rule}, got {getattr(self, name)!r}")

        low, high = TERNARY_BITS
        require(self.bits in BITS or low <= self.bits <= high, "bits", f"4 or 8, or {low} to {high} (ternary)")
        require(self.group_size in (None, *GROUP_SIZES), "group_size", "32, 64 or 128")
        require(self.method in METHODS, "method", "rtn, gptq or awq")
        require(self.trunk in TRUNK_BITS, "trunk", "none, int8 or int4")
        require(not self.is_ternary or self.method != "awq", "method", "rtn or gptq for ternary weights")
        for_trunk = not self.is_ternary or self.trunk != "none"
        require(for_trunk or self.group_size is None, "group_size", "left out: ternary weights have a scale a row")
        require(for_trunk or not self.asymmetric, "asymmetric", "false for ternary weights")
        require(not (self.is_ternary and self.act_order), "act_order", "false: GPTQ orders ternary weights anyway")
        require(self.calibration_tokens >= 1, "calibration_tokens", "at least 1")
        require(not self.act_order or self.method == "gptq", "act_order", "false where the method is not gptq")
        require(self.shard_bytes > 0, "shard_bytes", "positive")

    @property
    def is_ternary(self) -> bool:
        return self.bits not in BITS

    @property
    def experts(self) -> Grouping:
        """How the experts' matrices are quantised, where they are not ternary."""
        assert not self.is_ternary, "ternary weights are grouped by row"
        return Grouping(int(self.bits), self.group, self.asymmetric)

    @property
    def scheme(self) -> Scheme:
        """What the experts' matrices are rounded to."""
        return TernaryScheme(self.bits) if self.is_ternary else IntegerScheme(self.experts)

    @property
    def group(self) -> int:
        return self.group_size or DEFAULT_GROUP

    @property
    def attention(self) -> Grouping | None:
        """How the attention's matrices are quantised; None: they are not."""
        bits = TRUNK_BITS[self.trunk]
        return None if bits is None else Grouping(bits, self.group, self.asymmetric)

    def check(self, weight: Weight) -> None:
        """Raise `CheckpointError` where a weight's inputs are no whole number of groups."""
        inputs = weight.shape[-1]
        if self.is_ternary and weight.expert is not None:
            return
        if inputs % self.group:
            fitting = " or ".join(str(size) for size in GROUP_SIZES if inputs % size == 0) or "none"
            raise CheckpointError(
                f"`{weight.role}` has {inputs} inputs, no multiple of a group size of {self.group}; "
                f"of {', '.join(map(str, GROUP_SIZES))} fits: {fitting}"
            )


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What quantising the experts of one layer changed, and on what it was calibrated."""

    weight_error: float
    """Root of the mean squared change of the experts' weights, as a fraction of theirs."""
    output_error: float | None = None
    """The same of the layer's expert outputs on the calibration text; None: without a calibration text."""
    tokens: tuple[int, ...] = ()
    """Of the calibration text, routed to each expert."""
    smoothing: float | None = None
    """AWQ: the exponent that was chosen for the experts' inputs."""


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written; kept as `quantize.json`."""

    total_bytes: int
    source_bytes: int
    calibration_tokens: int
    layers: tuple[LayerReport, ...]
