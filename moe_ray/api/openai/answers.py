"""What the endpoints of OpenAI's API answer, as /openapi.json describes it. Fields that vLLM adds are among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moe_ray.api.documented import Documented

_FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class _Told(Documented):
    model_config = ConfigDict(extra="forbid")


class OpenAIErrorReason(_Told):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is to blame."""
    code: str | None


class OpenAIError(_Told):
    """Answer to a request that failed, or an event of a stream that did."""

    error: OpenAIErrorReason


class CachedPromptTokens(_Told):
    """Of the prompt."""

    cached_tokens: int
    """Found in the prefix cache."""


class UsageOfTokens(_Told):
    """Tokens that an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedPromptTokens


class RankedToken(_Told):
    """One of the likely tokens at a position of the prompt, or the prompt's own."""

    logprob: float
    rank: int
    """1: the most likely one."""
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class _Choice(_Told):
    index: int
    finish_reason: _FinishReason | None
    """null in a chunk that is not the choice's last one."""
    stop_reason: int | str | None = None
    """The token id or the string that ended it; null where the model ended it itself, or its length did."""
    token_ids: list[int] | None = None
    """There with `return_token_ids`."""
    degraded_positions: list[int] | None = None
    """Positions that were computed without one of their experts; there only where there are some."""
    routed_experts: str | None = None
    """There with `return_routed_experts`: [positions, layers, experts of each token], a .npy file in base64."""


class CompletionLogprobs(_Told):
    """Log-probabilities of consecutive tokens, and of the most likely ones in the place of each."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    """null of a prompt's first token."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Choice):
    """One text behind a prompt."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionChunkChoice(_Choice):
    """More of a text."""

    text: str
    logprobs: CompletionLogprobs | None
    routed_experts_start: int | None = None
    """The first position of `routed_experts`."""


class ScoredToken(_Told):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredChoice(ScoredToken):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(_Told):
    """Log-probabilities of consecutive tokens."""

    content: list[ScoredChoice]
    refusal: None


class CalledFunction(_Told):
    """What is called, and with what."""

    name: str
    arguments: str
    """JSON text."""


class CalledTool(_Told):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerTurn(_Told):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None
    function_call: CalledFunction | None = None
    """Of a request with `functions`, the old form of `tools`."""


class ChatChoice(_Choice):
    """One answer to a conversation."""

    message: AnswerTurn
    logprobs: ChatLogprobs | None


class CalledFunctionPart(_Told):
    """More of a function's call: its name once, then pieces of its arguments."""

    name: str | None = None
    arguments: str


class CalledToolPart(_Told):
    """More of the call of a tool; `id` and `type` come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionPart


class AnswerPart(_Told):
    """More of what the model says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CalledToolPart] | None = None
    function_call: CalledFunctionPart | None = None


class ChatChunkChoice(_Choice):
    """More of an answer."""

    delta: AnswerPart
    logprobs: ChatLogprobs | None
    routed_experts_start: int | None = None
    """The first position of `routed_experts`."""


class _Answer(_Told):
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """What computed the answer: this server's version."""


class CompletionAnswer(_Answer):
    """Answer to POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageOfTokens


class CompletionChunk(_Answer):
    """One event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: UsageOfTokens | None = None
    """Of the last chunk, with `stream_options.include_usage`; of all, with `continuous_usage_stats`."""


class ChatCompletionAnswer(_Answer):
    """Answer to POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageOfTokens
    prompt_token_ids: list[int] | None = None
    """There with `return_token_ids`."""
    prompt_logprobs: PromptLogprobs | None = None


class ChatChunk(_Answer):
    """One event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageOfTokens | None = None
    """Of the last chunk, with `stream_options.include_usage`; of all, with `continuous_usage_stats`."""
    prompt_token_ids: list[int] | None = None
    """Of the first chunk, with `return_token_ids`."""


class ModelCard(_Told):
    """The served model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    """When this server began to serve it, in seconds since 1970."""
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None
    """Most tokens of prompt and answer together; null before a trunk is up."""
    sampling_defaults: Annotated[dict[str, Any], Field(default_factory=dict)]
    """What the checkpoint's generation_config.json recommends, and requests get that say nothing else."""


class ModelList(_Told):
    """The model under each of its names."""

    object: Literal["list"]
    data: list[ModelCard]


class ServerVersion(_Told):
    """Answer to GET /version."""

    version: str


class ServerLoad(_Told):
    """Answer to GET /load."""

    server_load: int
    """Requests that this gateway works on."""
