"""The architectures of GGUF files that are read: what each says of itself, as keys of config.json.

Names and meanings are llama.cpp's (gguf-py, constants.py; the models' hyperparameters and graphs in src). One row each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.errors import CheckpointError
from moe_ray.model.formats import TensorEntry


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A file's metadata, asked for by keys without the architecture's name."""

    metadata: GgufMetadata
    architecture: str
    tensors: Mapping[str, TensorEntry]

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises `CheckpointError` where it is absent and has no default, or is none."""
        return self.metadata.integer(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Raises as `integer`."""
        return self.metadata.number(f"{self.architecture}.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        """Raises as `integer`."""
        return self.metadata.flag(f"{self.architecture}.{key}", default)

    @property
    def expert_size(self) -> int:
        """Intermediate size of one expert."""
        return self.integer("expert_feed_forward_length", 0) or self.integer("feed_forward_length")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of `ARCHITECTURES`."""

    model_type: str
    """In config.json."""
    model_class: str
    own: Callable[[ModelMetadata], dict[str, Any]]
    """The keys that only this family has. Raises `CheckpointError`."""
    reads: frozenset[str] = frozenset()
    """Metadata that `own` asks for, and that would change what others compute."""


def _mixtral(model: ModelMetadata) -> dict[str, Any]:
    return {
        "num_local_experts": model.integer("expert_count"),
        "intermediate_size": model.expert_size,
        "sliding_window": model.integer("attention.sliding_window", 0) or None,
    }


def _qwen(model: ModelMetadata, renormalise: bool) -> dict[str, Any]:
    """What both have; `renormalise`: what llama.cpp does where the file does not say."""
    used, dense = model.integer("expert_used_count"), model.integer("feed_forward_length")
    return {
        "num_experts": model.integer("expert_count"),
        "intermediate_size": dense,
        "moe_intermediate_size": model.integer("expert_feed_forward_length", 0) or dense // used,
        "norm_topk_prob": model.flag("expert_weights_norm", renormalise),
    }


def _qwen2(model: ModelMetadata) -> dict[str, Any]:
    found = _qwen(model, False)
    shared = model.integer("expert_shared_feed_forward_length", 0) or found["intermediate_size"]
    return {
        **found,
        "shared_expert_intermediate_size": shared,
        "qkv_bias": "blk.0.attn_q.bias" in model.tensors,
    }


def _qwen3(model: ModelMetadata) -> dict[str, Any]:
    return _qwen(model, True)


def _olmoe(model: ModelMetadata) -> dict[str, Any]:
    return {
        "num_experts": model.integer("expert_count"),
        "intermediate_size": model.expert_size,
        "norm_topk_prob": model.flag("expert_weights_norm", False),
        "clip_qkv": model.number("attention.clamp_kqv", 0.0) or None,
    }


def _granite(model: ModelMetadata) -> dict[str, Any]:
    if "blk.0.attn_q.bias" in model.tensors:
        raise CheckpointError(
            f"{model.metadata.source}: tensor blk.0.attn_q.bias: biases of queries and keys are not read of a "
            f"{model.architecture} file"
        )
    head_dim = model.integer("embedding_length") // model.integer("attention.head_count")
    return {
        "num_local_experts": model.integer("expert_count"),
        "intermediate_size": model.expert_size,
        # 0 is what llama.cpp has where a file does not say.
        "attention_multiplier": model.number("attention.scale", 0.0)
        or model.integer("attention.key_length", head_dim) ** -0.5,
        "embedding_multiplier": model.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": model.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": model.number("logit_scale", 0.0) or 1.0,
    }


_NORM: Final = "expert_weights_norm"
ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("mixtral", "MixtralForCausalLM", _mixtral, frozenset({"attention.sliding_window"})),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _qwen2, frozenset({_NORM, "expert_shared_feed_forward_length"})
    ),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3, frozenset({_NORM})),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM", _olmoe, frozenset({_NORM, "attention.clamp_kqv"})),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        _granite,
        frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
    ),
}
"""By `general.architecture`."""
REFUSED: Final = {
    "phimoe": "its rotary factors are tensors of the file, and how its router weighs experts is not told: use the "
    "model's safetensors",
}
"""Architectures of families that are served, and why their files are not read."""


def architecture_of(metadata: GgufMetadata) -> tuple[str, Architecture]:
    """llama.cpp's name of the architecture, and its row. Raises `CheckpointError` naming those that are read."""
    name = metadata.text("general.architecture")
    if name in REFUSED:
        raise CheckpointError(f"{metadata.source}: architecture {name!r}: {REFUSED[name]}")
    if name not in ARCHITECTURES:
        others = ", ".join(map(repr, list(ARCHITECTURES)[1:]))
        raise CheckpointError(
            f"{metadata.source}: architecture {name!r}, supported: 'llama' with experts (Mixtral), {others}"
        )
    return name, ARCHITECTURES[name]
