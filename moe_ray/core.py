"""The nouns of moe_ray, each defined once, used by every process. Plain data: no ray, no grpc, torch only in types."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from moe_ray.adapter_nouns import AdapterEntry as AdapterEntry
from moe_ray.adapter_nouns import AdapterRef as AdapterRef
from moe_ray.adapter_nouns import AdapterRows as AdapterRows
from moe_ray.engine_stats import EngineStats as EngineStats
from moe_ray.engine_stats import TierStats as TierStats
from moe_ray.errors import MoeRayError
from moe_ray.sampling import SamplingParams as SamplingParams
from moe_ray.timings import LayerTimes, SequenceTimes
from moe_ray.weight_layout import WeightLayout as WeightLayout

if TYPE_CHECKING:
    import numpy as np
    import torch

FinishReason = Literal["stop", "length", "abort"]
ExpertKey = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate, in token ids. `output_token_ids` is non-empty when a stream is replayed elsewhere."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    traceparent: str = ""
    """W3C trace context of the span that the trunk's spans belong to; "": the request is not traced."""
    adapter_id: int = 0
    """The adapter that is added to the model's weights for this sequence; 0: none."""
    adapter_source: str = ""
    """The directory that a process which does not hold the adapter yet reads it from."""

    @property
    def adapter(self) -> AdapterRef | None:
        """The adapter with its source; None: it has none."""
        return AdapterRef(self.adapter_id, self.adapter_source) if self.adapter_id else None

    def with_adapter(self, adapter: AdapterRef) -> Request:
        """The same sequence, computed with an adapter."""
        return replace(self, adapter_id=adapter.adapter_id, adapter_source=adapter.source)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's raw logits (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    rank: int = 0
    """Of the token among all by probability, 1 for the most likely; 0: not known."""


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The experts of consecutive positions of prompt and output; as arrays: `engine/routed_experts.py`.

    They are those the router chose, also where one of them was missing (`degraded_positions` says where).
    """

    start: int
    """Position of the first row; position i is token i of prompt and output."""
    shape: tuple[int, int, int]
    """[positions, num_hidden_layers, num_experts_per_tok]"""
    data: bytes
    """Expert numbers, row-major, ascending for each token and layer, in 1 byte each or in 2 (little-endian)."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one engine step did for one request. The last event has a `finish_reason` or an `error`.

    Without speculative decoding it carries one token; with it, as many as the step made certain.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended the sequence; it is in `token_ids` too, and not part of the text."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    queue_s: float = 0.0
    """With the first token: how long the sequence waited in the trunk before it was first computed."""
    degraded_positions: tuple[int, ...] = ()
    """Positions (of prompt and output) that were computed without one of their experts, since the last event."""
    routed_experts: RoutedExperts | None = None
    """Where asked for: of the positions that became certain since the last event. None: of none.

    An engine tells each position once, beginning with 0; one that goes on with a replayed request begins with 0, too.
    """
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Where asked for: of consecutive prompt tokens that became known since the last event, told once each; the token
    at position 0 has none. An engine that goes on with a replayed request begins with position 1 again."""
    prompt_logprobs_start: int = 0
    """Position of the first of them."""
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Constraint(Protocol):
    """What may follow the tokens of one sequence whose text must match a grammar: see `engine/grammar/state.py`."""

    failure: MoeRayError | None

    def ends_with(self, token_id: int) -> bool: ...
    def num_possible(self, draft: list[int]) -> int: ...
    def fill(self, bits: np.ndarray, draft: list[int]) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine. Scheduler, engine and routed_experts write to it, on the engine's thread only."""

    request: Request
    token_ids: list[int]
    """Prompt and output so far."""
    status: Status = Status.WAITING
    arrival: int = 0
    """Its number among those that the scheduler was given."""
    num_computed: int = 0
    """Leading tokens whose K and V are in the cache."""
    num_cached_prompt: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first admitted."""
    num_preemptions: int = 0
    times: SequenceTimes = field(default_factory=SequenceTimes)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache key of each full block, in order; extended lazily."""
    degraded: list[int] = field(default_factory=list)
    """Positions that were computed without one of their experts. Nothing from then on goes into the prefix cache."""
    degraded_told: int = 0
    """How many of them were in an event."""
    num_routed: int = 0
    """Leading positions whose experts are known, where the request asks for them; preemption does not lower it."""
    routed: bytearray = field(default_factory=bytearray)
    """`RoutedExperts.data` of those of them that were in no event yet: the last ones."""
    num_scored: int = 0
    """Leading prompt tokens whose log-probabilities were told, where the request asks for them: from 1 on."""
    constraint: Constraint | None = None
    """Where its text must match a grammar: set before it is scheduled."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]


@dataclass(slots=True, eq=False)
class Batch:
    """One engine step: prefill chunks and decodes side by side, flat, without a phase flag.

    Sequence i owns flat positions `query_start[i]:query_start[i+1]`; S sequences, T tokens in all.
    """

    sequences: list[Sequence]
    token_ids: list[int]  # [T]
    positions: list[int]  # [T]
    slot_mapping: list[int]  # [T] where each token's K and V go: block * block_size + offset
    query_start: list[int]  # [S + 1]
    context_lens: list[int]  # [S] tokens in the cache after this step, drafts included
    num_sampled: list[int]
    """[S] positions at the end of each chunk whose logits are wanted.

    0: the chunk does not reach the sequence's last token. 1: it does. k + 1: k drafts follow that token in the chunk;
    they are in no sequence yet, and become true as far as they are sampled in their places.
    """
    num_scored: list[int] = field(default_factory=list)
    """[S] positions just before the sampled ones whose logits are wanted too, for the prompt's log-probabilities.

    Empty: no sequence wants any."""
    degraded: set[int] = field(default_factory=set)
    """Flat positions that were computed without one of their experts (`on_expert_loss: renormalise`)."""
    routed: np.ndarray | None = None  # [T, num_hidden_layers, num_experts_per_tok]
    """Where a sequence asks for it: filled by the forward pass with the experts that each token is routed to; zeros in
    layers without experts."""
    layer_times: list[LayerTimes] | None = None
    """Where a sequence is traced: filled by the forward pass."""
    adapter_ids: list[int] = field(default_factory=list)
    """[S] the adapter of each sequence, ascending, 0 where it has none. Empty: no sequence has one."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_logits(self) -> list[int]:
        """[S] positions at the end of each chunk whose logits are wanted."""
        if not self.num_scored:
            return self.num_sampled
        return [scored + sampled for scored, sampled in zip(self.num_scored, self.num_sampled, strict=True)]

    def drafts(self, index: int) -> list[int]:
        """The drafts at the end of one sequence's chunk."""
        end = self.query_start[index + 1]
        return self.token_ids[end - max(self.num_sampled[index] - 1, 0) : end]


@dataclass(slots=True, eq=False)
class ExpertCall:
    """Rows of one layer for one expert. Stateless: it may be sent again, elsewhere, or twice."""

    layer: int
    expert: int
    rows: torch.Tensor  # [T, D]
    weights: torch.Tensor  # [T] float32 routing weights, multiplied in by the expert
    call_id: int = 0  # set by the link, unique on it
    taken_back: Callable[[], bool] | None = None
    """At the replica: asks, without waiting, whether the trunk has taken the call back."""
    adapters: tuple[AdapterRows, ...] = ()
    """Which adapter is added to the expert's weights for which rows: their counts sum to T. (): none for any."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's own view of its load, in the header of every reply."""

    queued_rows: int = 0
    """Rows waiting or being computed when the reply left."""
    compute_us: int = 0
    """Time the call spent computing."""
    queue_us: int = 0
    """Time the call waited for the compute thread."""


@dataclass(slots=True, eq=False)
class ExpertReply:
    call_id: int
    rows: torch.Tensor  # [T, D], already multiplied by the routing weights
    load: ReplicaLoad = ReplicaLoad()


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What an expert replica answers to `endpoint()`: its identity, what it holds, where it listens."""

    replica_id: str
    node_id: str
    pid: int
    keys: frozenset[ExpertKey]
    hidden_size: int
    dtype: str  # "float32", "bfloat16", "float16": of the rows on the wire
    addresses: Mapping[str, str]  # carrier → address, e.g. {"grpc": "10.0.0.3:43117", "ray": "SERVE_REPLICA::…"}
    loading: bool = False
    """It still loads: `keys` will grow."""
    adapters: frozenset[int] = frozenset()
    """Ids of the adapters that it holds for all its keys."""
    adapter_faults: Mapping[int, str] = field(default_factory=dict)
    """Adapter id → why it could not be loaded when it was last asked for."""


@dataclass(frozen=True, slots=True)
class TrunkInfo:
    """What a trunk answers to `endpoint()`."""

    replica_id: str
    node_id: str
    pid: int
    address: str
    """host:port of the gRPC `Trunk` service."""
    max_model_len: int
    kv_cache_tokens: int
    block_size: int = 0
    """Tokens of a block of its prefix cache; 0: gateways choose it by load alone."""
