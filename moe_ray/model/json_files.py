"""Reads the JSON files beside a checkpoint's weights. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_ray.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file; {} where there is no file. Raises `CheckpointError` naming the file if it holds none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
