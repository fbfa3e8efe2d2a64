"""The shape of a model, read from `config.json` (Hugging Face's names throughout)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moe_ray.core import ExpertKey
from moe_ray.errors import CheckpointError
from moe_ray.model.config_parts import (
    LatentAttention,
    check_groups,
    clamped_swiglu_of,
    clip_of,
    dense_layers_of,
    latent_of,
    router_of,
    shared_size,
    sliding_window_of,
)
from moe_ray.model.config_reader import ConfigReader
from moe_ray.model.families import FAMILIES, Bias, ClampedSwiGLU, ConfigKeys, Family, Router
from moe_ray.model.foreign import CONFIG, CONSOLIDATED, PARAMS, refuse_foreign
from moe_ray.model.formats.quantization import FILES, Quantization, quantization_from, quantization_of
from moe_ray.model.json_files import read_json_object
from moe_ray.model.mistral_params import config_of_params

HIDDEN_ACTS: Final = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DTYPES: Final = ("float32", "bfloat16", "float16")


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
    biases: frozenset[Bias] = frozenset()
    """Those that the model has."""
    shared_intermediate_size: int | None = None
    """Of the expert that every token goes to beside the chosen ones; None: there is none."""
    clip_qkv: float | None = None
    """Queries, keys and values are cut to this magnitude, after their norms; None: they are not."""
    dense_layers: frozenset[int] = frozenset()
    """Layers without experts: one network is in their stead, which the trunk computes."""
    dense_intermediate_size: int = 0
    """Of that network; 0: every layer has experts."""
    latent: LatentAttention | None = None
    """None: attention is by heads of queries, keys and values. Else `num_key_value_heads` is 1, and `head_dim` its
    `width`."""
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    """Of the products of queries and keys; None: the root of 1 / head_dim."""
    residual_multiplier: float = 1.0
    """Of what attention and experts add."""
    logits_scaling: float = 1.0
    """What logits are divided by."""
    context_limit: str = ""
    """Why `max_position_embeddings` is less than config.json says; empty where it is not."""
    clamped_swiglu: ClampedSwiGLU | None = None
    """What experts compute of gate and up; None: plain SwiGLU of `hidden_act`."""
    full_layers: frozenset[int] = frozenset()
    """Layers whose queries see all positions in spite of `sliding_window`."""

    @property
    def routed(self) -> bool:
        """Whether there is a router; else every token goes to the one expert."""
        return bool(self.family.config.num_experts)

    def window_of(self, layer: int) -> int | None:
        """How many positions each query of a layer sees; None: all."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def rope_parameters(self) -> Mapping[str, Any]:
        """What config.json, or the family where that says nothing, tells of rotary embeddings; {}: nothing."""
        return self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or self.family.config.rope_parameters

    @property
    def shared_share(self) -> bool:
        """Whether a matrix says how much of the shared expert counts; else all of it does."""
        return self.family.config.shared_intermediate_size is not None

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """Layers with experts, ascending."""
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in self.dense_layers)

    @property
    def expert_keys(self) -> frozenset[ExpertKey]:
        """Every (layer, expert) that there is."""
        return frozenset((layer, expert) for layer in self.mixture_layers for expert in range(self.num_local_experts))

    @property
    def rope_dim(self) -> int:
        """Elements of a head that are rotated, its last ones."""
        return self.head_dim if self.latent is None else self.latent.rope

    @property
    def kv_parts(self) -> int:
        """What is cached of a token in a layer and a KV head: a key and a value, or a latent that is both."""
        return 2 if self.latent is None else 1

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

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
            raise CheckpointError(f"{path}: not found; a checkpoint directory has a config.json")
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
        read, keys = ConfigReader(raw, source), family.config
        hidden, heads = read.positive_int("hidden_size"), read.positive_int("num_attention_heads")
        # A null means as many as query heads; an absent key means the family's default.
        kv_heads = read.positive_int(
            "num_key_value_heads", heads if "num_key_value_heads" in raw else keys.num_key_value_heads or heads
        )
        experts, top_k = 1, 1
        if keys.num_experts:
            experts = read.positive_int(read.first(keys.num_experts), keys.num_experts_default)
            top_k = read.positive_int("num_experts_per_tok", keys.num_experts_per_tok)
        rope, layers = _rope(read, keys), read.positive_int("num_hidden_layers")
        window, full_layers = sliding_window_of(read, keys, layers)
        latent, dense = latent_of(read, keys), dense_layers_of(read, keys, layers)
        if latent is None:
            head_dim = read.positive_int("head_dim", keys.head_dim or hidden // heads)
        else:
            kv_heads, head_dim = 1, latent.width
        config = ModelConfig(
            family=family,
            router=router_of(read, family),
            vocab_size=read.positive_int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.positive_int(keys.intermediate_size),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            max_position_embeddings=rope.positions,
            rms_norm_eps=read.positive_float("rms_norm_eps", keys.rms_norm_eps),
            hidden_act=read.one_of(
                "hidden_act", HIDDEN_ACTS if keys.clamped_swiglu is None else ("silu",), keys.hidden_act
            ),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=window,
            rope_type=rope.type,
            rope_theta=rope.theta,
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            raw=raw,
            quantization=quantization_of(raw, source),
            biases=frozenset(
                bias
                for bias, flag in keys.biases.items()
                if (flag.default if flag.key is None else read.flag(flag.key, flag.default))
            ),
            shared_intermediate_size=shared_size(read, keys),
            dense_layers=dense,
            dense_intermediate_size=read.positive_int(keys.dense_intermediate_size)
            if dense and keys.dense_intermediate_size
            else 0,
            latent=latent,
            attention_multiplier=None if latent is None else latent.scale,
            context_limit=rope.limit,
            clamped_swiglu=clamped_swiglu_of(read, keys),
            full_layers=full_layers,
            clip_qkv=clip_of(read, keys),
        )
        if keys.multipliers:
            config = replace(
                config,
                embedding_multiplier=read.positive_float("embedding_multiplier", 1.0),
                attention_multiplier=read.positive_float("attention_multiplier", 1.0),
                residual_multiplier=read.positive_float("residual_multiplier", 1.0),
                logits_scaling=read.positive_float("logits_scaling", 1.0),
            )
        if heads % kv_heads:
            raise CheckpointError(f"{source}: num_attention_heads {heads} is not a multiple of {kv_heads} kv heads")
        if top_k > experts:
            raise CheckpointError(
                f"{source}: num_experts_per_tok {top_k} exceeds {read.first(keys.num_experts)} {experts}"
            )
        check_groups(config.router, experts, top_k, source)
        if config.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim {config.head_dim} must be even for rotary embeddings")
        if config.router.jitter is not None and top_k != 2:
            raise CheckpointError(f"{source}: num_experts_per_tok is {top_k}, supported: 2 (SparseMixer chooses two)")
        read.refuse_other_computing(keys.irrelevant, f"{family.model_type!r} models")
        return config


@dataclass(frozen=True, slots=True)
class _Rope:
    type: str
    theta: float
    positions: int
    """The longest context."""
    limit: str = ""
    """Why it is less than `max_position_embeddings`."""


def _rope(read: ConfigReader, keys: ConfigKeys) -> _Rope:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling at the top level.
    raw, source = read.raw, read.source
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or keys.rope_parameters
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{source}: `rope_parameters` must be an object, found {scaling!r}")
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in keys.rope_types:
        raise CheckpointError(f"{source}: rope_type {kind!r} is not supported, supported: {', '.join(keys.rope_types)}")
    inner = ConfigReader(scaling, source)
    inner.refuse_other_computing((), f"rope_type {kind!r}")
    theta = (inner if scaling.get("rope_theta") is not None else read).positive_float("rope_theta", keys.rope_theta)
    positions = read.positive_int("max_position_embeddings", keys.max_position_embeddings)
    if kind != "longrope":
        return _Rope(kind, theta, positions)
    name = "original_max_position_embeddings"
    trained = (inner if scaling.get(name) is not None else read).positive_int(name, positions)
    if trained >= positions:
        return _Rope(kind, theta, positions)
    limit = f"longrope beyond `{name}` {trained} is not computed (config.json: {positions})"
    return _Rope(kind, theta, trained, limit)
