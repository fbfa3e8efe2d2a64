"""The body of POST /v1/responses.

Sampling parameters that OpenAI does not have are not listed here: see `further_fields.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    Tag,
    model_validator,
)

from moe_ray.api.documented import Documented
from moe_ray.api.responses.further_fields import SAMPLING
from moe_ray.api.sampling_fields import with_sampling
from moe_ray.sampling import MAX_LOGPROBS

LOGPROBS: Final = "message.output_text.logprobs"
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Part(Documented):
    """A part of OpenAI's; keys that this server has no use for are let pass."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class InputText(_Part):
    """Text of a user, a system message or a tool."""

    type: Literal["input_text"]
    text: str


class OutputText(_Part):
    """Text of an answer."""

    type: Literal["output_text"]
    text: str


class Refusal(_Part):
    """An answer that says why there is none."""

    type: Literal["refusal"]
    refusal: str


def _tag(kind: str) -> Tag:
    """The tag of a union's member. Errors' locations name it: in brackets, it is no field's name."""
    return Tag(f"<{kind}>")


def _shape(given: Any) -> str | None:
    """The tag of a value that is a text or a list."""
    return "<string>" if isinstance(given, str) else "<list>" if isinstance(given, list) else None


def _type(given: Any) -> str | None:
    """The tag of an object, from its `type`."""
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"<{kind}>" if isinstance(kind, str) else None


def _item_type(given: Any) -> str | None:
    """The tag of an item; a message may go without a `type`."""
    return _type({"type": "message", **given}) if isinstance(given, dict) else _type(given)


def _choice(given: Any) -> str | None:
    return "<string>" if isinstance(given, str) else _type(given)


_ContentPart = Annotated[
    Annotated[InputText, _tag("input_text")]
    | Annotated[OutputText, _tag("output_text")]
    | Annotated[Refusal, _tag("refusal")],
    Discriminator(_type),
]
Content = Annotated[
    Annotated[str, _tag("string")] | Annotated[list[_ContentPart], Field(min_length=1), _tag("list")],
    Discriminator(_shape),
]
ToolOutput = Annotated[
    Annotated[str, _tag("string")] | Annotated[list[InputText], Field(min_length=1), _tag("list")],
    Discriminator(_shape),
]


class InputMessage(_Part):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: ItemStatus = "completed"


class FunctionCall(_Part):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """JSON text of an object."""
    id: str | None = None
    status: ItemStatus = "completed"


class FunctionCallOutput(_Part):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: str
    output: ToolOutput
    id: str | None = None
    status: ItemStatus = "completed"


class ReasoningItem(_Part):
    """What another model thought. The models served here are not shown it."""

    type: Literal["reasoning"]


InputItem = Annotated[
    Annotated[InputMessage, _tag("message")]
    | Annotated[FunctionCall, _tag("function_call")]
    | Annotated[FunctionCallOutput, _tag("function_call_output")]
    | Annotated[ReasoningItem, _tag("reasoning")],
    Discriminator(_item_type),
]
Input = Annotated[
    Annotated[str, _tag("string")] | Annotated[list[InputItem], Field(min_length=1), _tag("list")],
    Discriminator(_shape),
]


class FunctionTool(_Part):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class NamedTool(_Part):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class AllowedTools(_Part):
    """The tools that this answer may call, of those that are declared."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required"], _tag("string")]
    | Annotated[NamedTool, _tag("function")]
    | Annotated[AllowedTools, _tag("allowed_tools")],
    Discriminator(_choice),
]


class PlainFormat(_Part):
    """Any text."""

    type: Literal["text"] = "text"


class JsonObjectFormat(_Part):
    """Some JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Part):
    """JSON that follows a schema."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: StrictBool | None = None


TextFormat = Annotated[
    Annotated[PlainFormat, _tag("text")]
    | Annotated[JsonObjectFormat, _tag("json_object")]
    | Annotated[JsonSchemaFormat, _tag("json_schema")],
    Discriminator(_type),
]


class TextOptions(_Part):
    """What the text of the answer is."""

    format: TextFormat = PlainFormat()
    verbosity: Literal["medium"] = "medium"


class ResponsesStreamOptions(_Part):
    """What a stream carries beside the answer."""

    include_obfuscation: StrictBool = False
    """Random text in each delta, so that the sizes of packets do not tell those of tokens."""


class ReasoningOptions(_Part):
    """Taken, and without effect: the models served here do not reason, and the response says so."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(_Part):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=with_sampling(SAMPLING, {}))

    input: Input
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = []
    tool_choice: ToolChoiceField = "auto"
    parallel_tool_calls: StrictBool = True
    max_tool_calls: Annotated[StrictInt, Field(ge=1)] | None = None
    """Of built-in tools, which this server does not have."""
    truncation: Literal["auto", "disabled"] = "disabled"
    store: StrictBool | None = None
    background: StrictBool = False
    stream: StrictBool = False
    stream_options: ResponsesStreamOptions | None = None
    include: list[
        Literal[
            "message.output_text.logprobs",
            "reasoning.encrypted_content",
            "file_search_call.results",
            "web_search_call.results",
            "web_search_call.action.sources",
            "message.input_image.image_url",
            "computer_call_output.output.image_url",
            "code_interpreter_call.outputs",
        ]
    ] = []
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] = 0
    metadata: Annotated[
        dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
        Field(max_length=16),
    ] = {}
    reasoning: ReasoningOptions = ReasoningOptions()
    service_tier: Literal["auto", "default"] = "auto"
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
