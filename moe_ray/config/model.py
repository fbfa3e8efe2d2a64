"""The `model` section: which model, and how it is computed."""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import Field, field_validator

from moe_ray.config.section import Section

DEMO_MODEL: Final = "demo"
InstructionSet = Literal["avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "neon_dotprod", "neon"]
KernelChoice = Literal["auto", "native", "triton", "torch"] | InstructionSet


class ModelSection(Section):
    """Which model, and how it is computed."""

    path: str = DEMO_MODEL
    """A directory, a Hugging Face repo id, or `demo`: the demo model, built on first use."""
    revision: str | None = None
    """Branch, tag or commit of the Hugging Face repository. Default: its main branch."""
    served_name: str | None = None
    """The name by which clients ask for the model. Default: the last part of `path`."""
    aliases: tuple[str, ...] = ()
    """Further names by which clients may ask for it; `*` stands for anything, as in `claude-*`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations, and of weights that are not quantised. auto: the checkpoint's, but bfloat16 for float16 on a
    CPU with bfloat16 instructions; float32 on a CPU that is slow at both."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where trunk and experts compute. auto: the GPU where the process sees one, else the CPU."""
    kernels: KernelChoice = "auto"
    """native: the C++ kernels, for CPUs with AVX2 and arm64, built on first use. triton: those for cards, compiled on
    first use. auto: either where they run, else torch. Or the native ones of one instruction set that this CPU has, so
    that unlike machines compute alike."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights instead of the model's, of which config.json is enough: to measure speed and memory."""
    enforce_eager: bool = False
    """On a card, launch kernels one by one, and not as CUDA graphs: slower, with less memory."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and output together. Default: the model's, cut to what the KV cache holds."""
    hf_overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the model's config.json that have other values than in the file, as an object or its JSON. A
    `rope_scaling` (or `rope_parameters`) of type yarn or linear makes contexts longer by its factor."""

    @field_validator("hf_overrides", mode="before")
    @classmethod
    def _as_an_object(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"must be a JSON object ({error})") from None
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        return value

    @field_validator("aliases")
    @classmethod
    def _named(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(alias.strip() for alias in aliases):
            raise ValueError("a name is not empty")
        return aliases
