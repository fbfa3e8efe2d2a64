"""A model as OpenAI's list shows it, with the fields that vLLM adds."""

from __future__ import annotations

from typing import Any

from moe_ray.api.service import ServedModel


def model_card(service: ServedModel, name: str) -> dict[str, Any]:
    """The served model under one of its names, or an adapter: its `parent` is the model, its `root` where it is."""
    adapter = service.adapter(name)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "moe_ray",
        "root": service.served_name if adapter is None else adapter.source,
        "parent": None if adapter is None else service.served_name,
        "max_model_len": service.max_model_len,
        "sampling_defaults": service.tokenizer.sampling_defaults,  # ours: what a request leaves out
    }
