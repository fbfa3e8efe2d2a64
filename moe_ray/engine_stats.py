"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """What became of KV blocks below the cache: in host memory ("swap") and on a disk."""

    swap_bytes: int = 0
    """Held now."""
    disk_bytes: int = 0
    """In the directory, of other processes too, as far as is known."""
    swap_stored_bytes: int = 0
    swap_loaded_bytes: int = 0
    swap_hit_tokens: int = 0
    """Tokens that were loaded from host memory instead of computed; among `prefix_hit_tokens`."""
    swap_evicted_blocks: int = 0
    swap_load_seconds: float = 0.0
    """Time of steps that went into copies to the cache, from either tier."""
    disk_written_bytes: int = 0
    disk_loaded_bytes: int = 0
    disk_hit_tokens: int = 0
    """Tokens that were loaded from the disk instead of computed; among `prefix_hit_tokens`."""
    disk_read_seconds: float = 0.0
    """Time of the thread that reads."""
    disk_removed_files: int = 0
    """To stay below the limit."""
    disk_damaged_files: int = 0
    disk_dropped_blocks: int = 0
    """Blocks that were not queued to be written: the queue was full."""
    disk_failures: int = 0
    """Reads and writes that the system refused."""
    tier_declined_tokens: int = 0
    """Tokens that lay in a tier and were computed all the same: as measured, that is faster."""


@dataclass(frozen=True, slots=True)
class EngineStats(TierStats):
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
