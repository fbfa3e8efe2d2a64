"""What ollama's clients are told of the served model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from moe_ray.api.service import ServedModel

_LEVELS: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NEVER: Final = "9999-12-31T23:59:59Z"


def model_cards(service: ServedModel) -> list[dict[str, Any]]:
    """The model under each of its names, as GET /api/tags lists it."""
    named = [(service.check_model(name).model, name) for name in service.names]
    return [{**_card(model, name), "modified_at": _modified(model)} for model, name in named]


def loaded_cards(service: ServedModel) -> list[dict[str, Any]]:
    """The same as GET /api/ps lists it."""
    named = [(service.check_model(name).model, name) for name in service.names]
    loaded = {"expires_at": _NEVER, "size_vram": 0}
    return [{**_card(model, name), **loaded, "context_length": model.max_model_len} for model, name in named]


def shown(service: ServedModel) -> dict[str, Any]:
    """All that POST /api/show tells."""
    tokenizer = service.tokenizer
    recommended = [f"{name} {value}" for name, value in sorted(tokenizer.sampling_defaults.items())]
    tools = ["tools"] if tokenizer.chat_template.exists else []
    return {
        "modelfile": f"FROM {service.served_name}\n",
        "parameters": "\n".join(recommended),
        "template": tokenizer.chat_template.source,
        "details": _details(service),
        "model_info": _model_info(service),
        "capabilities": ["completion", *tools],
        "modified_at": _modified(service),
    }


def _card(service: ServedModel, name: str) -> dict[str, Any]:
    tagged = name if ":" in name else f"{name}:latest"
    facts = service.facts
    details = _details(service)
    return {"name": tagged, "model": tagged, "size": facts.nbytes, "digest": facts.digest, "details": details}


def _details(service: ServedModel) -> dict[str, Any]:
    facts = service.facts
    family = str(facts.config.raw["model_type"])
    return {
        "parent_model": "",
        "format": facts.container,
        "family": family,
        "families": [family],
        "parameter_size": _in_words(facts.num_parameters),
        "quantization_level": _LEVELS.get(facts.weights, facts.weights.upper()),
    }


def _model_info(service: ServedModel) -> dict[str, str | int | float]:
    """By the names of GGUF's metadata, as ollama tells them."""
    config = service.facts.config
    family = str(config.raw["model_type"])
    own: dict[str, str | int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": service.max_model_len or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    return {
        "general.architecture": family,
        "general.parameter_count": service.facts.num_parameters,
        **{f"{family}.{name}": value for name, value in own.items()},
    }


def _modified(service: ServedModel) -> str:
    return datetime.fromtimestamp(service.facts.modified_s, UTC).isoformat().replace("+00:00", "Z")


def _in_words(count: int) -> str:
    """A number of parameters: 46.7B, 135M, 412K."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}" if count < 100 * unit else f"{count / unit:.0f}{letter}"
    return str(count)
