"""What the page's routes answer, as /openapi.json describes it."""

from __future__ import annotations

from typing import Literal

from moe_ray.api.documented import Documented

ReplicaState = Literal["starting", "loading", "running", "stopping", "away"]


class SeenReplica(Documented):
    """A replica of an expert. One that does not answer has its `replica_id` and its `state` alone."""

    replica_id: str
    state: ReplicaState
    deployment: str | None = None
    node: str | None = None
    pid: int | None = None
    loaded: float | None = None
    """Part of its weights that it has."""
    device: str | None = None
    format: str | None = None
    busy: float | None = None
    rows_per_s: float | None = None
    queue_ms: float | None = None
    queued_rows: int | None = None
    weight_bytes: int | None = None


class SeenExpert(Documented):
    """An expert and its replicas."""

    expert: int
    deployment: str | None
    wanted: int | None
    """Replicas that there are to be; null where Serve does not know."""
    rows_per_s: float
    rows_per_layer: list[int]
    busy: float
    replicas: list[SeenReplica]


class SeenTrunk(Documented):
    """A trunk. One that does not answer has its `replica_id` and its `state` alone."""

    replica_id: str
    state: ReplicaState
    model: str | None = None
    """The name of the model that it computes."""
    node: str | None = None
    pid: int | None = None
    device: str | None = None
    format: str | None = None
    running: int | None = None
    """Sequences."""
    waiting: int | None = None
    kv_use: float | None = None
    """Part of the cache that is in use."""
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None
    generated_tokens: int | None = None
    missing: list[str] | None = None


class HouseSeen(Documented):
    """Trunks and experts of this moment."""

    model: str
    layers: int
    num_experts: int
    top_k: int
    missing: list[str]
    """Parts of the model that are not up."""
    trunks: list[SeenTrunk]
    experts: list[SeenExpert]
    window_s: float
    """Rates are of so many seconds."""
    max_over_mean: float | None
    control: bool
    """Whether replicas may be changed here."""


class Scaled(Documented):
    """What an expert is scaled to."""

    expert: int
    replicas: int | None


class Killed(Documented):
    """The replica whose process was killed."""

    replica_id: str
