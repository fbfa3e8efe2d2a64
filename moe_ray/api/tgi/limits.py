"""What the operator allows requests to TGI's routes, and what GET /info tells. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TgiLimits:
    """Bounds of TGI's parameters, by the names of its launcher's flags."""

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    """None: one less than a sequence may have in all."""
    payload_limit_bytes: int = 2_000_000
    grammars: bool = True
    """False: requests with a `grammar` are refused."""
    max_concurrent_requests: int = 0
    """Told in /info."""
    compute_type: str = "cpu"
    """Told in the header x-compute-type."""
    model_id: str | None = None
    """Told in /info. None: the served name."""
    model_sha: str | None = None
