"""The shape of a model, read from `config.json` (Hugging Face's names throughout)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moe_ray.errors import CheckpointError
from moe_ray.model.families import FAMILIES, Family, Router
from moe_ray.model.foreign import CONFIG, CONSOLIDATED, PARAMS, refuse_foreign
from moe_ray.model.formats.quantization import FILES, Quantization, quantization_from, quantization_of
from moe_ray.model.json_files import read_json_object
from moe_ray.model.mistral_params import config_of_params

HIDDEN_ACTS: Final = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DTYPES: Final = ("float32", "bfloat16", "float16")
ROPE_TYPES: Final = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of one model."""

    family: Family
    router: Router
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    sliding_window: int | None
    rope_type: str
    rope_theta: float
    dtype: str
    raw: Mapping[str, Any]
    """The whole config.json, for what only one reader needs (RoPE scaling factors, token ids)."""
    quantization: Quantization | None = None
    """How its weights are quantised; None: config.json and the files beside it say nothing of it."""

    @staticmethod
    def load(directory: Path) -> ModelConfig:
        """Read `directory/config.json`, or else Mistral's params.json.

        Raises `CheckpointError` naming the file and the key, or what is there else.
        """
        path = directory / CONFIG
        if directory.is_dir():
            refuse_foreign(directory)
            if not path.exists() and any(directory.glob(CONSOLIDATED)):
                path = directory / PARAMS
        config = ModelConfig.read(path)
        if config.quantization is None:
            for beside in (directory / name for name in FILES):
                if settings := read_json_object(beside):
                    return replace(config, quantization=quantization_from(settings, str(beside)))
        return config

    @staticmethod
    def read(path: Path) -> ModelConfig:
        """Read a config.json, whatever its name, or params.json. Raises `CheckpointError` naming file and key."""
        if not path.exists():
            raise CheckpointError(f"{path}: not found; a Mixtral-format checkpoint directory has a config.json")
        raw = read_json_object(path)
        return ModelConfig.from_dict(config_of_params(raw, str(path)) if path.name == PARAMS else raw, str(path))

    @staticmethod
    def from_dict(raw: Any, source: str = "config.json") -> ModelConfig:
        """Build from a parsed config.json. Raises `CheckpointError` naming `source` and the key."""
        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        family = FAMILIES.get(str(raw.get("model_type")))
        if family is None:
            raise CheckpointError(
                f"{source}: model_type is {raw.get('model_type')!r}, supported: {', '.join(map(repr, FAMILIES))}"
            )
        read, keys = _Reader(raw, source), family.config
        hidden, heads = read.positive_int("hidden_size"), read.positive_int("num_attention_heads")
        # A null means as many as query heads; an absent key means the family's default.
        kv_heads = read.positive_int(
            "num_key_value_heads", heads if "num_key_value_heads" in raw else keys.num_key_value_heads
        )
        experts = read.positive_int(keys.num_experts, keys.num_experts_default)
        top_k = read.positive_int("num_experts_per_tok", keys.num_experts_per_tok)
        rope_type, rope_theta = _rope(raw, source, keys.rope_theta)
        config = ModelConfig(
            family=family,
            router=family.router,
            vocab_size=read.positive_int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive_int(keys.intermediate_size),
            num_hidden_layers=read.positive_int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=read.positive_int("head_dim", hidden // heads),
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            max_position_embeddings=read.positive_int("max_position_embeddings", keys.max_position_embeddings),
            rms_norm_eps=read.positive_float("rms_norm_eps", keys.rms_norm_eps),
            hidden_act=read.one_of("hidden_act", HIDDEN_ACTS, keys.hidden_act),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=read.positive_int("sliding_window") if raw.get("sliding_window") else None,
            rope_type=rope_type,
            rope_theta=rope_theta,
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            raw=raw,
            quantization=quantization_of(raw, source),
        )
        if heads % kv_heads:
            raise CheckpointError(f"{source}: num_attention_heads {heads} is not a multiple of {kv_heads} kv heads")
        if top_k > experts:
            raise CheckpointError(f"{source}: num_experts_per_tok {top_k} exceeds {keys.num_experts} {experts}")
        if config.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim {config.head_dim} must be even for rotary embeddings")
        return config


@dataclass(frozen=True, slots=True)
class _Reader:
    raw: Mapping[str, Any]
    source: str

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: `{key}` must be a positive integer, found {value!r}")
        return value

    def positive_float(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.source}: `{key}` must be a positive number, found {value!r}")
        return float(value)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.raw.get(key, default)
        if value not in allowed:
            raise CheckpointError(f"{self.source}: `{key}` is {value!r}, supported: {', '.join(allowed)}")
        return str(value)


def _rope(raw: Mapping[str, Any], source: str, default_theta: float) -> tuple[str, float]:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling at the top level.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{source}: `rope_parameters` must be an object, found {scaling!r}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{source}: rope_type {kind!r} is not supported, supported: {', '.join(ROPE_TYPES)}")
    holder = scaling if scaling.get("rope_theta") is not None else raw
    return str(kind), _Reader(holder, source).positive_float("rope_theta", default_theta)
