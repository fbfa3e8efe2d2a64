"""The bodies of Anthropic's Messages API, and what of them is not supported.

Beside Anthropic's own fields, every field of `SamplingParams` that an answer of this API can carry is one of the body.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from moe_ray.api.documented import Documented
from moe_ray.api.sampling_fields import NAMES, with_sampling


class Block(Documented):
    """One piece of a message's content. `cache_control` and `citations` are accepted: prefixes are always cached."""

    model_config = ConfigDict(extra="ignore")


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    """What another model thought; the prompt goes without it."""

    type: Literal["thinking", "redacted_thinking"]


class ToolUseBlock(Block):
    """The model called a tool."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolResultBlock(Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = []
    is_error: bool = False


ContentBlock = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
Content = Annotated[list[ContentBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[ContentBlock])]


class MessageTurn(Documented):
    """What one side says; several of one side in a row are one. `system` among them is said in the user's turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(Documented):
    """A function that the client runs. `cache_control`, `input_examples`, … are accepted and change nothing."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False


class ToolChoiceSetting(Documented):
    """Whether tools may or must be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the tool that must be called, with "tool"."""
    disable_parallel_tool_use: bool = False


class ThinkingSetting(Documented):
    """Whether the model thinks before it answers: it does not, so it may be told to decide, and not be told to."""

    model_config = ConfigDict(extra="allow")

    type: Literal["disabled", "adaptive"]


class MessageFormat(Documented):
    """The answer's text is JSON of a schema."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Documented):
    """What the answer is like. `effort` is a hint to models that think."""

    model_config = ConfigDict(extra="forbid")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: MessageFormat | None = None


HARMLESS: Final = frozenset(
    {"cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "user_profile_id", "workspace_id"}
)
"""Fields about accounting, routing and caching: the answer is the same with or without them."""

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "container": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
"""Field → the values with which it asks for nothing. Any other value would change the answer, so it is refused."""

SAMPLING: Final = NAMES - {
    *("grammar", "bad_words_ids", "logprobs", "max_tokens", "prompt_logprobs", "return_routed_experts", "stop"),
}
"""Further fields of a body: those that an answer can carry, and that have no other name here."""


FURTHER: Final[dict[str, dict[str, Any]]] = {
    **{name: {"description": "Accepted, without effect."} for name in sorted(HARMLESS)},
    **{
        name: {"enum": [None, *neutral], "description": "No other value is supported."}
        for name, neutral in NEUTRAL.items()
    },
    "context_management": {
        "anyOf": [{"type": "object"}, {"type": "null"}],
        "description": "Edits that leave out what the model thought, as every prompt does. No others are supported.",
    },
}
"""Field → its schema, of those that are no fields of the models."""


class PromptRequest(Documented):
    """Body of POST /v1/messages/count_tokens: what the prompt is made of."""

    model_config = ConfigDict(extra="allow", json_schema_extra=with_sampling(SAMPLING, FURTHER))

    model: str
    messages: Annotated[list[MessageTurn], Field(min_length=1)]
    system: Texts = []
    tools: list[CustomTool] = []
    tool_choice: ToolChoiceSetting | None = None
    thinking: ThinkingSetting | None = None
    output_config: OutputConfig | None = None
    output_format: MessageFormat | None = None
    """Older name of `output_config.format`."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class MessagesRequest(PromptRequest):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    """Most tokens of the answer; it also ends where the model's context does, and then says so."""
    stream: bool = False
    stop_sequences: list[Annotated[str, Field(min_length=1)]] = []


class AnswerBlock(Documented):
    """One piece of an answer: `text`, or a call's `id`, `name` and `input`."""

    type: Literal["text", "tool_use"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(Documented):
    """Tokens that an answer took; those of the prompt are the sum of the three."""

    input_tokens: int
    """Computed for this request."""
    cache_creation_input_tokens: int
    """Always 0: nothing is charged for being kept."""
    cache_read_input_tokens: int
    """Found in the prefix cache."""
    output_tokens: int


class MessageAnswer(Documented):
    """Answer to POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorDetail(Documented):
    """What was wrong."""

    type: str
    message: str


class MessageEvent(Documented):
    """One event of a streamed answer; which fields it has depends on its type, which is its name as well."""

    type: Literal[
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: dict[str, Any] | None = None
    """Of message_start: the answer before it has content."""
    index: int | None = None
    """Of a content block."""
    content_block: AnswerBlock | None = None
    delta: dict[str, Any] | None = None
    """text_delta or input_json_delta of a block; stop_reason and stop_sequence of the message."""
    usage: MessageUsage | None = None
    error: MessageErrorDetail | None = None
    request_id: str | None = None


class MessageTokens(Documented):
    """Answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageError(Documented):
    """Answer to a request that failed."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str


class MessageModel(Documented):
    """The served model under one of its names."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    """When this server began to serve it."""
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class MessageModels(Documented):
    """The model under each of its names."""

    data: list[MessageModel]
    has_more: bool
    first_id: str
    last_id: str
