"""What every section of the configuration is made of, and how a fault in one is told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Quantization = Literal["int8", "int4", "nf4"]
"""What weights may be quantised to while they are loaded."""


class Section(BaseModel):
    """A part of the configuration tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explain(error: ValidationError, prefix: str = "") -> str:
    """One line per fault of a validation error: the key, what is wrong, what is allowed."""
    lines = []
    for fault in error.errors():
        key = prefix + ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown configuration key `{key}`")
        else:
            lines.append(f"`{key}`: {fault['msg']}, got {fault['input']!r}")
    return "; ".join(lines)
