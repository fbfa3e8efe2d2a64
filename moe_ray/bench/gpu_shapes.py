"""The models that `bench gpu` measures: shapes of published ones with random weights, as cards hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from moe_ray.config import Config, load_config
from moe_ray.console import Report as Progress
from moe_ray.errors import ConfigError
from moe_ray.hub import resolve_model

GROUP: Final = 128
"""Inputs that share a scale in the quantised ones, as in most GPTQ checkpoints."""

_MIXTRAL: Final[dict[str, Any]] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "mixtral-8x7b": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "vocab_size": 32000,
    },
    "mixtral-8x22b": {
        **_MIXTRAL,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "max_position_embeddings": 65536,
        "vocab_size": 32768,
    },
    "tiny": {
        **_MIXTRAL,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": 512,
    },
}
"""By name; config.json as published (huggingface.co/mistralai), and one that an interpreter computes."""
WEIGHTS: Final[dict[str, int | None]] = {"bfloat16": None, "float16": None, "int8": 8, "int4": 4}
"""What matrices are held as → bits of their codes; None: floats of this name."""


def shape_config(shape: str, weights: str, num_layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape in a format, cut to `num_layers`. Raises `ConfigError` with what is allowed."""
    if shape not in SHAPES:
        raise ConfigError(f"--shape: {shape!r}; allowed: {', '.join(SHAPES)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"--weights: {weights!r}; allowed: {', '.join(WEIGHTS)}")
    bits = WEIGHTS[weights]
    raw = {**SHAPES[shape], "torch_dtype": "float16" if bits else weights}
    if bits:
        raw["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False}
    if num_layers is not None:
        raw["num_hidden_layers"] = num_layers
    return raw


def shape_model(raw: dict[str, Any], name: str, cache_dir: Path, progress: Progress) -> Path:
    """The directory of a checkpoint of random weights with this config.json. Raises `CheckpointError`."""
    directory = cache_dir.expanduser() / "gpu-bench" / name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    text = json.dumps(raw, indent=2) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    config: Config = load_config({"model": {"path": str(path), "load_format": "dummy"}, "cache_dir": str(cache_dir)})
    return resolve_model(config, progress)
