"""The bodies of OpenAI's completions and chat completions, and what of them is not supported.

Sampling parameters are not listed here: every field of `SamplingParams` is one of the body, by the same name, and has
its rule there.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, StrictInt, model_validator

from moe_ray.api.documented import Documented
from moe_ray.api.job import MAX_CHOICES
from moe_ray.api.openai.formats import TextFormatFields
from moe_ray.api.openai.tools import Choice, FunctionBody, LegacyChoice, ToolBody
from moe_ray.api.sampling_fields import NAMES, with_sampling

SAMPLING: Final = NAMES - {"grammar", "bad_words_ids"}
"""Sampling parameters that are fields of a body."""
MAX_BEST_OF: Final = 20
MAX_N: Final = 128
"""Most choices for each prompt."""


class StreamOptions(Documented):
    """What a stream carries beside the tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(TextFormatFields):
    """The fields both endpoints share. Others are kept: sampling parameters, unsupported and harmless ones."""

    model_config = ConfigDict(extra="allow", json_schema_extra=with_sampling(SAMPLING))

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Keep so many tokens of the end of a longer prompt; -1: as many as the context leaves for it."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    add_special_tokens: bool = True
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    """Generate so many choices for each prompt and answer with the `n` whose tokens are likeliest."""


class ContentPart(Documented):
    """One part of a message's content; parts other than text are refused by the tokenizer, by name."""

    type: str
    text: str | None = None


class ChatMessage(Documented):
    """One turn of a conversation. Further keys (`name`, ...) are passed to the template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatFields(GenerationRequest):
    """What the two chat endpoints have in common."""

    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Field(default_factory=dict)]
    continue_final_message: bool = False
    logprobs: bool = False
    documents: list[dict[str, Any]] | None = None
    function_call: LegacyChoice | None = None
    functions: Annotated[list[FunctionBody], Field(default_factory=list)]
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    """For templates that read it."""
    tool_choice: Choice | None = None
    tools: Annotated[list[ToolBody], Field(default_factory=list)]
    top_logprobs: int = 0


class ChatRequest(ChatFields):
    """Body of POST /v1/chat/completions."""

    messages: Conversation

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """The one."""
        return [self.messages]


class BatchChatRequest(ChatFields):
    """Body of POST /v1/chat/completions/batch: choices of each conversation, in their order."""

    messages: Annotated[list[Conversation], Field(min_length=1, max_length=MAX_CHOICES)]

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """All of them."""
        return self.messages


ChatBody = ChatRequest | BatchChatRequest
Body = CompletionRequest | ChatBody

UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (),
    "cache_salt": (),
    "chat_template": (),
    "grammar": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Field → the values with which it asks for nothing. Any other value would change the answer, so it is refused."""

UNION_RULES: Final = {
    "tool_choice": 'must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
    "function_call": 'must be "none", "auto" or {"name": …}',
    "prompt": "must be a string, a list of strings, a list of token ids or a list of lists of token ids",
    "messages": "must be a list of {role, content}, where content is a string or a list of {type: text, text}",
}
"""pydantic reports one error for each member of a union; these say it once."""
