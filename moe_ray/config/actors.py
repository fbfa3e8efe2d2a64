"""What Ray reserves for an actor, and how the number of actors of one kind may change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from moe_ray.config.section import Quantization, Section

_LABEL: Final = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY: Final = re.compile(rf"(?:[a-zA-Z0-9_.-]{{1,253}}/)?{_LABEL}")
_LABEL_VALUE: Final = re.compile(rf"!?(?:{_LABEL}|in\({_LABEL}(?:, ?{_LABEL})*\))")


class ActorOptions(Section):
    """What Ray reserves for one actor. CPU shares are small: they place actors, they do not limit them."""

    num_cpus: float = Field(default=0.1, ge=0)
    """CPU cores that Ray reserves for each actor."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs, or the share of one, that Ray reserves for each actor. Where no actor's is set, `moe-ray serve` plans them
    from the cluster's cards."""
    resources: Mapping[str, float] = {}
    """Custom Ray resources that Ray reserves for each actor: name → amount."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of its card in GiB that each actor may take for weights, KV cache and what it computes with; more is an
    error. `moe-ray serve` plans it where actors share a card. Default: no limit."""
    accelerator_type: str | None = None
    """Ray's name of the card that its node must have, such as T4 or L4."""
    labels: Mapping[str, str] = {}
    """Labels that its node must have: label → a value, `!value`, `in(a,b)` or `!in(a,b)`."""
    num_replicas: int = Field(default=1, ge=1)
    """Number of replicas at the start."""
    quantize: Quantization | None = None
    """Hold the weights in fewer bits, with a scale for each group of inputs: int8 (groups of 128), int4 (of 32) or nf4
    (of 64, by a table). They are quantised while they load, on a CPU. Norms, gates and embeddings stay as they are.
    Default: as stored."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where these actors compute, where that is not `model.device`: experts on CPUs beside others on cards."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads of the process on a CPU. Default: all cores for a trunk with native kernels, else one."""

    @field_validator("labels")
    @classmethod
    def _as_ray_writes_them(cls, labels: Mapping[str, str]) -> Mapping[str, str]:
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key):
                raise ValueError(f"{key!r} is no label (letters, digits, `-_.`, and one `/` after a prefix)")
            if not _LABEL_VALUE.fullmatch(value):
                raise ValueError(f"{key}: must be a value, !value, in(a,b) or !in(a,b), not {value!r}")
        return labels


class ScaledOptions(ActorOptions):
    """Actors whose number may change while they serve; they start with `num_replicas`."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest replicas that autoscaling leaves running."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most replicas that autoscaling starts. Default: `num_replicas`, so the number does not grow."""

    @field_validator("min_replicas")
    @classmethod
    def _not_above_start(cls, least: int, info: ValidationInfo) -> int:
        start: int = info.data.get("num_replicas", least)
        if least > start:
            raise ValueError(f"must be at most num_replicas ({start})")
        return least

    @field_validator("max_replicas")
    @classmethod
    def _not_below_start(cls, most: int | None, info: ValidationInfo) -> int | None:
        start: int = info.data.get("num_replicas", 1)
        if most is not None and most < start:
            raise ValueError(f"must be at least num_replicas ({start})")
        return most

    @property
    def most_replicas(self) -> int:
        """`max_replicas` or its default."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas


class ReportsSection(Section):
    """What replicas tell the scaling policy."""

    interval_s: float = Field(default=1.0, gt=0)
    """Seconds between two reports of a replica."""
    look_back_s: float = Field(default=3.0, gt=0, validate_default=True)
    """Seconds over which the reports are averaged. A longer time delays every scaling step by as much."""

    @field_validator("look_back_s")
    @classmethod
    def _several_reports(cls, value: float, info: ValidationInfo) -> float:
        interval = info.data.get("interval_s", 0.0)
        if value < 2 * interval:
            raise ValueError(f"must be at least twice interval_s ({interval:g})")
        return value
