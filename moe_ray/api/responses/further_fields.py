"""Fields of POST /v1/responses that `ResponsesRequest` does not list: sampling parameters, and refused ones."""

from __future__ import annotations

from typing import Final

from moe_ray.api.sampling_fields import NAMES

UNSUPPORTED: Final = frozenset(
    {
        *("access_programs", "background_options", "context_management", "conversation", "image", "moderation"),
        *("prompt", "prompt_cache_options"),
    }
)
"""Fields of OpenAI's that would change the answer."""
INSTEAD: Final = {"max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}
"""Fields of the other endpoints → what they are called here."""
UNTOLD: Final = frozenset(
    {"max_tokens", "logprobs", "prompt_logprobs", "grammar", "bad_words_ids", "return_routed_experts"}
)
"""Sampling parameters that are asked for by another name here, or whose result a response has no place for."""
SAMPLING: Final = NAMES - UNTOLD
"""Sampling parameters that are fields of a body."""
