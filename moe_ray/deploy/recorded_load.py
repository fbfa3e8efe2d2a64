"""The recorded load that a configuration names: which experts and layers had most to do."""

from __future__ import annotations

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.experts.planning.balance import parse_load
from moe_ray.model.model_config import ModelConfig


def recorded_rows(config: Config, model: ModelConfig) -> list[list[float]] | None:
    """rows[layer][expert] of `experts.recorded_load`; None where it is not set.

    Raises `ConfigError` naming the file where it cannot be read, or is of a model of another shape.
    """
    path = config.experts.recorded_load
    if path is None:
        return None
    name = f"experts.recorded_load {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows = parse_load(text, name)
    shape = model.num_hidden_layers, model.num_local_experts
    if (len(rows), len(rows[0])) != shape:
        raise ConfigError(
            f"{name}: {len(rows)} layers of {len(rows[0])} experts, the model has {shape[0]} of {shape[1]}"
        )
    return rows
