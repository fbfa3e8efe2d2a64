"""What the endpoints of Responses answer, as /openapi.json describes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from moe_ray.api.documented import Documented
from moe_ray.api.responses.schemas import ItemStatus

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class _Answer(Documented):
    model_config = ConfigDict(extra="forbid")


class TokenLikelihood(_Answer):
    """A token and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChosenToken(TokenLikelihood):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TokenLikelihood]


class AnswerText(_Answer):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    """None: they come from built-in tools."""
    logprobs: list[ChosenToken]


class AnswerMessage(_Answer):
    """What the model says."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[AnswerText]


class AnswerCall(_Answer):
    """A function that the model calls."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """JSON text."""


class ResponseFault(_Answer):
    """What ended a response instead of an answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class CutOff(_Answer):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class CachedTokens(_Answer):
    """Of the input."""

    cached_tokens: int
    """Found in the prefix cache."""
    cache_write_tokens: Literal[0]


class ReasoningTokens(_Answer):
    """Of the output."""

    reasoning_tokens: Literal[0]


class ResponseTokens(_Answer):
    """Tokens that a response took."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseObject(_Answer):
    """A response. Behind `usage` stand the fields that repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseFault | None
    incomplete_details: CutOff | None
    output: list[Annotated[AnswerMessage | AnswerCall, Field(discriminator="type")]]
    usage: ResponseTokens | None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    """Whether it can be asked for again."""
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    degraded_positions: list[int] = []
    """Positions that were computed without one of their experts; there only where there are some."""


class ResponseStreamEvent(Documented):
    """One event. Its further fields depend on its type, as OpenAI's reference lists them."""

    model_config = ConfigDict(extra="allow")

    type: str
    """`response.created`, `response.output_text.delta`, …"""
    sequence_number: int
    """From 0, one more with each event."""


class DeletedResponse(_Answer):
    """A response that is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemPage(_Answer):
    """A page of the items of a response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
