"""The `engine` section: continuous batching and the KV cache of one trunk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from moe_ray.config.section import Section


class EngineSection(Section):
    """Continuous batching and the KV cache of one trunk."""

    block_size: int = Field(default=16, ge=1, le=256)
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Default: a fifth of the free memory on CPU (at most 4 GiB), most of the free memory on a GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    max_waiting: int = Field(default=1024, ge=1)
    enable_prefix_caching: bool = True
    micro_batches: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = "auto"
    """Parts of a step that take turns computing and waiting for experts. auto: as many as turn out to be fastest."""
    speculative: Literal["off", "ngram"] = "off"
    """ngram: guess tokens from what followed the last ones before, and verify several in one step."""
    num_speculative_tokens: int = Field(default=4, ge=1, le=16)
    """Most guesses per sequence and step."""
    prompt_lookup_max: int = Field(default=4, ge=1, le=16)
    """Longest run of last tokens that is looked up; shorter ones follow."""
    prompt_lookup_min: int = Field(default=2, ge=1, le=16, validate_default=True)

    @field_validator("prompt_lookup_min")
    @classmethod
    def _not_above_max(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("prompt_lookup_max", value)
        if value > most:
            raise ValueError(f"must be at most prompt_lookup_max ({most})")
        return value
