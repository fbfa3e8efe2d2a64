"""The `model` section: which model, and how it is computed."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from moe_ray.config.section import Section

DEMO_MODEL: Final = "demo"


class ModelSection(Section):
    """Which model, and how it is computed."""

    path: str = DEMO_MODEL
    """A directory, a Hugging Face repo id, or `demo`: the demo model, built on first use."""
    revision: str | None = None
    served_name: str | None = None
    """The name that clients use; default: the last part of `path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's, or float32 on a CPU that has no bfloat16 instructions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    """native: our own, for bfloat16 on CPUs with AVX512-BF16, built on first use. auto: those, else torch."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus output; default: the model's, cut to what the KV cache holds."""
