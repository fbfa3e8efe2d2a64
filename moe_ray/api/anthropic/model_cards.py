"""A model as Anthropic's list shows it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from moe_ray.api.service import ServedModel


def model_info(service: ServedModel, name: str) -> dict[str, Any]:
    """The served model under one of its names. `created_at` is when this server began to serve it."""
    return {
        "type": "model",
        "id": name,
        "display_name": service.served_name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": service.max_model_len,
        "max_tokens": service.max_model_len,
    }
