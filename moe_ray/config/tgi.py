"""The `gateway.tgi` section: what requests to TGI's routes may ask for."""

from __future__ import annotations

from pydantic import Field

from moe_ray.config.section import Section
from moe_ray.sampling import MAX_LOGPROBS, MAX_STOP_STRINGS


class TgiSection(Section):
    """What requests to TGI's routes may ask for."""

    max_best_of: int = Field(default=2, ge=1, le=128)
    """Largest `best_of`."""
    max_stop_sequences: int = Field(default=4, ge=0, le=MAX_STOP_STRINGS)
    """Most `stop` strings."""
    max_top_n_tokens: int = Field(default=5, ge=0, le=MAX_LOGPROBS)
    """Largest `top_n_tokens`."""
    max_input_tokens: int | None = Field(default=None, ge=1)
    """Longest input. Default: one token less than prompt and output may have together."""
    payload_limit_bytes: int = Field(default=2_000_000, ge=1)
    """Longest body; beyond that 413."""
    grammars: bool = True
    """Requests may have a `grammar`."""
