"""What GET /experts answers, as /openapi.json describes it."""

from __future__ import annotations

from moe_ray.api.documented import Documented


class ReplicaOfExpert(Documented):
    """What one replica of an expert did in the window. How busy it is, and what waits, is said of all it holds."""

    deployment: str
    replica_id: str
    node_id: str
    pid: int
    rows_per_layer: list[int]
    """Of this expert."""
    rows_per_s: float
    busy: float
    """Part of the window in which it computed."""
    rows_per_call: float
    queue_ms: float
    """How long a call waited, on average."""
    queued_rows: int
    weight_bytes: int


class ExpertRows(Documented):
    """What one expert did in the window."""

    expert: int
    replicas: list[ReplicaOfExpert]
    rows_per_layer: list[int]
    rows_per_s: float
    busy: float
    """Mean of its replicas."""


class ExpertsLoad(Documented):
    """Answer to GET /experts."""

    experts: list[ExpertRows]
    """None with `transport: local`."""
    window_s: float
    max_over_mean: float | None
    """Rows of the busiest expert over the mean of all; null while there are none."""
