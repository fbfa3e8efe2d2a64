"""moe_ray serves Mixtral-format mixture-of-experts language models expert-parallel on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_ray.core import SamplingParams
from moe_ray.sampling import Grammar

if TYPE_CHECKING:
    from moe_ray.llm import LLM

__all__ = ["LLM", "Grammar", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # LLM brings torch along; processes that need only the nouns should not pay for it.
    if name == "LLM":
        from moe_ray.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
