"""The nouns of moe_ray, each defined once, used by every process. Plain data: no ray, no grpc, torch only in types."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_ray.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import torch

FinishReason = Literal["stop", "length", "abort"]
ExpertKey = tuple[int, int]  # (layer, expert)

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are chosen. Names and defaults are the field's (OpenAI, vLLM, transformers).

    Raises `InvalidRequest` naming the field on a value outside its range.
    """

    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the model's context length."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids are masked until this many tokens exist."""
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence from the logit of each token in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → value added to its logit."""
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens. None: drawn once when the request is accepted."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings (cut out of the text)."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; k: log-probability of the chosen token and of the k most likely."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_routed_experts: bool = False
    """Tell which experts each computed token went to. The whole prompt is computed then, whatever is cached."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"`{name}` must be {rule}, got {getattr(self, name)!r}", name)

        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        require(self.min_tokens >= 0, "min_tokens", "at least 0")
        if self.max_tokens is not None:
            require(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        require(0.0 <= self.temperature <= 2.0, "temperature", "between 0 and 2")
        require(self.top_k >= -1, "top_k", "-1 or 0 (off) or at least 1")
        require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(0.0 < self.repetition_penalty < 1e4, "repetition_penalty", "above 0")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        require(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", "between 0 and 2**63 - 1")
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}"
        )
        require(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "values in -100..100")
        require(
            len(self.stop) <= MAX_STOP_STRINGS and all(self.stop),
            "stop",
            f"at most {MAX_STOP_STRINGS} strings, none of them empty",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate, in token ids. `output_token_ids` is non-empty when a stream is replayed elsewhere."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, from the model's raw logits (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


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
    degraded_positions: tuple[int, ...] = ()
    """Positions (of prompt and output) that were computed without one of their experts, since the last event."""
    routed_experts: RoutedExperts | None = None
    """Where asked for: of the positions that became certain since the last event. None: of none.

    An engine tells each position once, beginning with 0; one that goes on with a replayed request begins with 0, too.
    """
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine. Owned by the scheduler: nobody else writes to it."""

    request: Request
    token_ids: list[int]
    """Prompt and output so far."""
    status: Status = Status.WAITING
    num_computed: int = 0
    """Leading tokens whose K and V are in the cache."""
    num_cached_prompt: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first admitted."""
    num_preemptions: int = 0
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
    degraded: set[int] = field(default_factory=set)
    """Flat positions that were computed without one of their experts (`on_expert_loss: renormalise`)."""
    routed: np.ndarray | None = None  # [T, num_hidden_layers, num_experts_per_tok]
    """Where a sequence asks for it: filled by the forward pass with the experts that each token is routed to."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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
    """At the replica: asks, without waiting, whether nobody waits for the reply any more."""


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
    """What an expert replica answers to `endpoint()`: who it is, what it holds, where it listens."""

    replica_id: str
    node_id: str
    pid: int
    keys: frozenset[ExpertKey]
    hidden_size: int
    dtype: str  # "float32", "bfloat16", "float16": of the rows on the wire
    addresses: Mapping[str, str]  # carrier → address, e.g. {"grpc": "10.0.0.3:43117", "ray": "SERVE_REPLICA::…"}
    loading: bool = False
    """It still loads: `keys` will grow."""


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
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    draft_tokens: int = 0
    """Guessed tokens that were verified (speculative decoding)."""
    accepted_draft_tokens: int = 0
    """Those of them that are in the output."""
    degraded_tokens: int = 0
    """Tokens that were computed without one of their experts."""
