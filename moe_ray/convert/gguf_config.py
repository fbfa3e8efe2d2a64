"""config.json and generation_config.json of a mixture of experts in a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from moe_ray.convert.gguf_architectures import Architecture, ModelMetadata, architecture_of
from moe_ray.convert.gguf_metadata import GgufMetadata
from moe_ray.errors import CheckpointError
from moe_ray.model.formats import TensorEntry

log = logging.getLogger(__name__)

_READ: Final = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length"),
    *("expert_count", "expert_used_count", "vocab_size", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    "attention.layer_norm_rms_epsilon",
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "attention.sliding_window": (0,),
    "expert_gating_func": (0, 1),  # none said; softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "attention.scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.layer_norm_epsilon": (),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
}
"""Keys that say how a model computes → the values that change nothing, unless its row of `ARCHITECTURES` reads them."""
_SAMPLING: Final = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Of "general.sampling." → generation_config.json."""
_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Of "tokenizer.ggml.": the ids that end a text, a turn, a message."""


def config_of(metadata: GgufMetadata, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The model's config.json. Raises `CheckpointError` naming the key of what is not read."""
    name, row = architecture_of(metadata)
    model = ModelMetadata(metadata, name, tensors)
    _refuse_other_computations(model, row)
    integer = model.integer
    if not integer("expert_count", 0):
        raise CheckpointError(
            f"{metadata.source}: a dense model, without experts; `moe-ray convert upcycle` makes experts of it"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{metadata.source}: tensor token_embd.weight is missing from the file")
    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{metadata.source}: metadata `{name}.{key}` is {integer(key)}, supported: that of a head, {head_dim}"
            )
    rope = _rope(model)
    return {
        "architectures": [row.model_class],
        "model_type": row.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "num_experts_per_tok": integer("expert_used_count"),
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": model.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "dtype": _dtype(tensors),
        **row.own(model),
        **{name: ids[0] for name, ids in _special_ids(metadata).items()},
    }


def generation_config_of(metadata: GgufMetadata) -> dict[str, Any]:
    """What generation_config.json would say: end tokens, and the sampling that the file recommends."""
    found: dict[str, Any] = dict(_special_ids(metadata))
    for key, name in _SAMPLING.items():
        if (path := f"general.sampling.{key}") in metadata:
            found[name] = metadata.integer(path) if name == "top_k" else metadata.number(path)
    return found


def _special_ids(metadata: GgufMetadata) -> dict[str, list[int]]:
    ends = [metadata.integer(f"tokenizer.ggml.{key}") for key in _ENDS if f"tokenizer.ggml.{key}" in metadata]
    return {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}


def _refuse_other_computations(model: ModelMetadata, row: Architecture) -> None:
    metadata, prefix = model.metadata, f"{model.architecture}."
    for key, neutral in _NEUTRAL.items():
        value = metadata.values.get(prefix + key)
        if value is not None and value not in neutral and key not in row.reads:
            allowed = " or ".join(map(repr, neutral)) or "absent"
            raise CheckpointError(f"{metadata.source}: metadata `{prefix}{key}` is {value!r}, supported: {allowed}")
    factors = [name for name in model.tensors if name.startswith("rope_f")]
    if factors:
        raise CheckpointError(
            f"{metadata.source}: tensor {factors[0]}: rotary embeddings with a factor for each frequency are not "
            f"supported"
        )
    ours = {key.removeprefix(prefix) for key in metadata.values if key.startswith(prefix)}
    if unknown := sorted(ours - _READ - set(_NEUTRAL) - row.reads):
        log.warning("%s: metadata that is not understood and has no effect: %s", metadata.source, ", ".join(unknown))


def _rope(model: ModelMetadata) -> dict[str, Any]:
    metadata, named = model.metadata, f"{model.architecture}.rope.scaling.type"
    theta = model.number("rope.freq_base", 10000.0)
    kind = metadata.text(named, "none")
    factor = model.number("rope.scaling.factor", 0) or model.number("rope.scale_linear", 0)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{metadata.source}: metadata `{named}` is {kind!r}, supported: 'none', 'linear'")
    if factor in (0, 1) or (kind == "none" and named in metadata):
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _dtype(tensors: Mapping[str, TensorEntry]) -> str:
    """The float dtype nearest to what most bytes are in: bfloat16 for codes, as most of what was quantised had been."""
    sizes: dict[str, int] = {}
    for entry in tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")
