"""The sampling that a checkpoint recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_ray.core import SamplingParams
from moe_ray.errors import CheckpointError, InvalidRequest
from moe_ray.model.json_files import read_json_object

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_defaults(directory: Path) -> dict[str, float]:
    """What generation_config.json recommends, by the names of `SamplingParams`.

    Raises `CheckpointError` naming the file and the key of a value that no request could use.
    """
    path = directory / "generation_config.json"
    recommended = read_json_object(path)
    found: dict[str, Any] = {name: recommended[name] for name in _FIELDS if recommended.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
            raise CheckpointError(f"{path}: `{name}` must be a number, found {value!r}")
        only: dict[str, Any] = {name: value}
        try:
            SamplingParams(**only)
        except InvalidRequest as error:
            raise CheckpointError(f"{path}: {error}") from None
    return found
