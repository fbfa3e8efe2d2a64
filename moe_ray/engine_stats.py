"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine; cheap to take."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    prompt_tokens: int = 0
    """Tokens computed as prompt (recomputation after preemption included)."""
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    drafts: int = 0
    """Runs of guessed tokens."""
    draft_tokens: int = 0
    """Guessed tokens that were verified (speculative decoding)."""
    accepted_draft_tokens: int = 0
    """Those of them that are in the output."""
    degraded_tokens: int = 0
    """Tokens that were computed without one of their experts."""
    adapters: int = 0
    """Adapters that can be computed with now."""
