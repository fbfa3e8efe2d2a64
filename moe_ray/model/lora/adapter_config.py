"""`adapter_config.json` as peft writes it: which matrices have low-rank additions, of which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_ray.errors import AdapterError, CheckpointError
from moe_ray.model.json_files import read_json_object

FILE: Final = "adapter_config.json"
MAX_RANK: Final = 256
"""Of one matrix. Gate and up in one tensor may have twice as much: peft stacks their ranks."""

_READ: Final = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters"),
        *("init_lora_weights", "ensure_weight_tying", "bias", "fan_in_fan_out", "use_dora"),
    )
)
_OF_TRAINING: Final = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "task_type", "peft_version"),
        *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "runtime_config"),
    )
)
"""Keys that say nothing of what is computed."""
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_SUPPORTED: Final = "supported: LoRA without biases, with ranks up to 256, rank and alpha patterns, rsLoRA"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter says of itself."""

    source: str
    """The file, for messages."""
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    """Ends of module names, a regular expression of whole names, or "all-linear"."""
    exclude_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    """None: all."""
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool

    @staticmethod
    def read(directory: Path) -> AdapterConfig:
        """Read the file of an adapter's directory. Raises `AdapterError` naming the file and the key."""
        path = directory / FILE
        try:
            raw = read_json_object(path)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        if not raw:
            raise AdapterError(f"{path}: not found, or empty; an adapter in peft's format has one")
        return AdapterConfig.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = FILE) -> AdapterConfig:
        """Build from the parsed file. Raises `AdapterError` naming `source` and the key."""
        _refuse(raw, source)
        read = _Keys(raw, source)
        rank, layers = read.rank("r", raw.get("r", 8), MAX_RANK), raw.get("layers_to_transform")
        patterns = read.mapping("rank_pattern")
        config = AdapterConfig(
            source=source,
            rank=rank,
            alpha=read.number("lora_alpha", raw.get("lora_alpha", 8)),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern={key: read.rank(f"rank_pattern.{key}", r, 2 * MAX_RANK) for key, r in patterns.items()},
            alpha_pattern={
                key: read.number(f"alpha_pattern.{key}", value) for key, value in read.mapping("alpha_pattern").items()
            },
            target_modules=read.names_or_pattern("target_modules"),
            exclude_modules=read.names_or_pattern("exclude_modules"),
            target_parameters=read.names("target_parameters"),
            layers_to_transform=None if layers is None else read.layers(layers),
            layers_pattern=read.names("layers_pattern"),
            modules_to_save=read.names("modules_to_save"),
            ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        )
        for key in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(config, key), str):
                _compiled(pattern, f"{source}: `{key}`")
        for key in (*config.rank_pattern, *config.alpha_pattern):
            _compiled(key, f"{source}: a key of `rank_pattern` or `alpha_pattern`")
        return config

    def of(self, name: str) -> tuple[int, float]:
        """Rank and scale of the module or parameter of this name: alpha over r, or over its root (rsLoRA).

        rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
        """
        rank = int(_matching(self.rank_pattern, name, self.rank))
        alpha = float(_matching(self.alpha_pattern, name, self.alpha))
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, name: str, layer: int | None) -> bool:
        """Whether the module of this name, of a decoder layer or of none, is to have a low-rank addition."""
        if _named(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            found = not name.endswith("lm_head")
        else:
            found = _named(self.target_modules, name)
        if not found or self.layers_to_transform is None or isinstance(self.target_modules, str):
            return found
        listed = not self.layers_pattern or any(f"{pattern}.{layer}." in name for pattern in self.layers_pattern)
        return listed and layer in self.layers_to_transform

    def targets_parameter(self, name: str) -> bool:
        """Whether the parameter of this name is to have a low-rank addition."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def saves(self, name: str) -> bool:
        """Whether the module of this name is saved whole."""
        return any(name == target or name.endswith(f".{target}") for target in self.modules_to_save)


def _matching(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first key that is the end of a name, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _named(targets: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _compiled(pattern: str, what: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{what} is {pattern!r}, which is no regular expression ({error})") from None


def _refuse(raw: Mapping[str, Any], source: str) -> None:
    """Raise `AdapterError` for what is computed in another way than a low-rank addition."""
    kind = str(raw.get("peft_type"))
    if kind.upper() != "LORA":
        raise AdapterError(f"{source}: `peft_type` is {kind}, {_SUPPORTED}")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"{source}: `bias` is {raw['bias']!r}, {_SUPPORTED}")
    start = raw.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"{source}: `init_lora_weights` is {start!r}, which changes the base model's weights: convert it to a "
            "plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in ("fan_in_fan_out", "use_dora", *sorted(raw.keys() - _READ - _OF_TRAINING)):
        if raw.get(key):
            what = "DoRA is not supported" if key == "use_dora" else "which is not supported"
            raise AdapterError(f"{source}: `{key}` is {raw[key]!r}, {what}; {_SUPPORTED}")


@dataclass(frozen=True, slots=True)
class _Keys:
    raw: Mapping[str, Any]
    source: str

    def rank(self, key: str, value: object, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise AdapterError(f"{self.source}: `{key}` is {value!r}, expected a whole number from 1 to {most}")
        return value

    def number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise AdapterError(f"{self.source}: `{key}` is {value!r}, expected a number")
        return float(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"{self.source}: `{key}` is {value!r}, expected an object")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise AdapterError(f"{self.source}: `{key}` is {value!r}, expected a list of names")
        return tuple(value)

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str:
        value = self.raw.get(key)
        return value if isinstance(value, str) else self.names(key)

    def layers(self, value: object) -> tuple[int, ...]:
        layers = [value] if isinstance(value, int) else value
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise AdapterError(f"{self.source}: `layers_to_transform` is {value!r}, expected numbers of layers")
        return tuple(layers)
