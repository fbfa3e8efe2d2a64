"""What an upcycled model is made by: all that is needed to see that it is there already.

No torch: the processes that serve the demo model look it up, and only one of them has ever to build it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

from moe_ray.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) from the caller's thread; total is 0 where it is unknown. May raise to stop."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to no one."""


@dataclass(frozen=True, slots=True)
class UpcycleConfig:
    """What to make of the dense model. Raises `ConfigError` on a value outside its range."""

    num_experts: int = 8
    top_k: int = 2
    noise: float = 0.02
    """Gaussian noise on each expert's weights, in standard deviations of the dense weight; 0: same function."""
    confidence: float = 0.5
    """Mean of the router's largest softmax probability over the calibration text."""
    seed: int = 0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    shard_bytes: int = 500_000_000
    max_document_tokens: int = 256
    generation: Mapping[str, float | bool] = field(default_factory=dict)
    """Sampling defaults for generation_config.json, e.g. {"do_sample": True, "temperature": 0.2}."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ConfigError(f"upcycle: `{name}` must be {rule}, got {getattr(self, name)!r}")

        require(self.num_experts >= 2, "num_experts", "at least 2")
        require(1 <= self.top_k <= self.num_experts, "top_k", f"between 1 and num_experts ({self.num_experts})")
        require(0.0 <= self.noise <= 1.0, "noise", "between 0 and 1")
        require(1 / self.num_experts < self.confidence < 1.0, "confidence", "above 1 / num_experts and below 1")
        require(self.dtype in ("bfloat16", "float16", "float32"), "dtype", "bfloat16, float16 or float32")
        require(self.shard_bytes > 0, "shard_bytes", "positive")
        require(self.max_document_tokens >= 8, "max_document_tokens", "at least 8")


def text_bytes() -> bytes:
    """The built-in calibration text as stored (part of what a recipe's version depends on)."""
    return resources.files("moe_ray.convert").joinpath("upcycle_text.json").read_bytes()
