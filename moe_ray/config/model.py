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
    """Branch, tag or commit of the Hugging Face repository. Default: its main branch."""
    served_name: str | None = None
    """The name by which clients ask for the model. Default: the last part of `path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations. auto: the checkpoint's, or float32 on a CPU without bfloat16 instructions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where trunk and experts compute. auto: the GPU where the process sees one, else the CPU."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """native: the C++ kernels, for bfloat16 on CPUs with AVX512-BF16, built on first use. auto: those where they
    run, else torch."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and output together. Default: the model's, cut to what the KV cache holds."""
