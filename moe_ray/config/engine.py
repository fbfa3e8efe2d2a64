"""The `engine` section: continuous batching and the KV cache of one trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from moe_ray.config.section import Quantization, Section


class EngineSection(Section):
    """Continuous batching and the KV cache of one trunk."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens of one block of the paged KV cache. Prefixes are cached in whole blocks."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of the KV cache. Default: a fifth of the free memory on a CPU (at most 4 GiB), most of it on a GPU."""
    kv_cache_tokens: int | None = Field(default=None, ge=2)
    """Most tokens that the KV cache has room for, where the memory would hold more. Default: no limit."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """What keys and values are held as. auto: the dtype that the trunk computes in. int8: with a scale for each token
    and head, about half of bfloat16's memory. fp8, or fp8_e4m3: floats of 8 bits without scales, half of it exactly."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that are computed in one step."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Most tokens of one step. A longer prompt is computed in chunks."""
    max_waiting: int = Field(default=1024, ge=1)
    """Most requests in the waiting queue; further ones are refused with 429."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of finished requests and reuse them for prompts that begin alike."""
    kv_swap_gib: float = Field(default=0.0, ge=0)
    """Host memory below the KV cache: blocks that it gives up are kept there, and loaded where measured times say that
    this is faster than to compute them. 0: none. On a CPU `kv_cache_gib` is the better place for the same memory."""
    kv_disk_dir: Path | None = None
    """A directory that keeps KV blocks over restarts, for all trunks of one model that have it. Prompts can be guessed
    from it. Default: none."""
    kv_disk_gib: float = Field(default=16.0, gt=0)
    """Most that all files in `kv_disk_dir` take together; those that were not used for longest are removed."""
    micro_batches: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = "auto"
    """Parts of a step that take turns: one computes while another waits for its experts.
    auto: time 1, 2 and 3 for each size of step and keep the fastest."""
    speculative: Literal["off", "ngram", "draft", "auto"] = "off"
    """Guess tokens, and verify several in one step. ngram: from what followed the last ones earlier in the text.
    draft: by `draft_model`, in every step. auto: by whichever of the two pays, as measured, or none."""
    draft_model: str | None = Field(default=None, validate_default=True)
    """A small dense Llama, or another model that is read, with the model's own vocabulary: a directory, a Hugging Face
    repo id, or `demo`, what the demo model was made of. Each trunk holds it beside its own weights."""
    draft_quantize: Quantization | None = None
    """Hold the draft model's weights in fewer bits, with native kernels."""
    num_speculative_tokens: int = Field(default=4, ge=1, le=16)
    """Most guesses per sequence and step."""
    prompt_lookup_max: int = Field(default=4, ge=1, le=16)
    """Longest run of last tokens that is looked up in the text; shorter runs are tried next."""
    prompt_lookup_min: int = Field(default=2, ge=1, le=16, validate_default=True)
    """Shortest run of last tokens that is looked up; at most `prompt_lookup_max`."""

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _by_its_short_name(cls, value: object) -> object:
        return "fp8" if value == "fp8_e4m3" else value  # as vLLM spells it

    @field_validator("kv_disk_dir")
    @classmethod
    def _the_same_in_every_process(cls, value: Path | None) -> Path | None:
        found = None if value is None else value.expanduser()
        if found is not None and not found.is_absolute():
            raise ValueError("must be an absolute path: each trunk has a working directory of its own")
        return found

    @field_validator("kv_swap_gib", "kv_disk_dir")
    @classmethod
    def _of_cached_prefixes(cls, value: float | Path | None, info: ValidationInfo) -> float | Path | None:
        if value and not info.data.get("enable_prefix_caching", True):
            raise ValueError("enable_prefix_caching is false: blocks are found by their prefixes")
        return value

    @field_validator("draft_model")
    @classmethod
    def _where_needed(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("speculative")
        if value is None and kind == "draft":
            raise ValueError("speculative is draft: name the model that drafts")
        if value is not None and kind in ("off", "ngram"):
            raise ValueError(f"speculative is {kind}: a draft model is used with draft and auto")
        return value

    @field_validator("draft_quantize")
    @classmethod
    def _of_a_model(cls, value: Quantization | None, info: ValidationInfo) -> Quantization | None:
        if value is not None and info.data.get("draft_model") is None:
            raise ValueError("there is no draft_model")
        return value

    @field_validator("prompt_lookup_min")
    @classmethod
    def _not_above_max(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("prompt_lookup_max", value)
        if value > most:
            raise ValueError(f"must be at most prompt_lookup_max ({most})")
        return value
