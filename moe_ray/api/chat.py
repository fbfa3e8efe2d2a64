"""A turn of a conversation as every chat API asks for it: what is said, the tools, what the answer may be.

An API parses its own body into a `ChatInput`; `chat_prompt` makes the prompt, the grammar that the answer must match,
and the reader that takes the answer apart. The parts are in `Delta.parts` and `ChoiceOutput.answer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_ray.api.job import Prompt
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.answers.parts import PlainReader
from moe_ray.text.messages import Message
from moe_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of its arguments, of type object."""
    strict: bool = False
    """Arguments must match the schema even where the model may choose whether to call."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools."""

    mode: str = "auto"
    """"none", "auto", "required"; or "named": `name` must be called."""
    name: str = ""
    parallel: bool = True
    """More than one call in an answer."""


@dataclass(frozen=True, slots=True)
class ChatInput:
    """One conversation that waits for an answer."""

    messages: Sequence[Message]
    """In the form that chat templates take: {role, content, tool_calls: [{id, type, function: {name, arguments}}],
    tool_call_id, name}; a call's `arguments` are a JSON object, not its text."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    grammar: Grammar | None = None
    """What the text of the answer must match (`response_format`)."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def chat_prompt(chat: ChatInput, tokenizer: Tokenizer) -> Prompt:
    """Render and tokenize a conversation. Raises `InvalidRequest` as `Tokenizer.apply_chat_template` does."""
    if chat.tools and chat.tool_choice.mode != "none":
        raise InvalidRequest("`tools` is not supported", "tools")
    ids = tokenizer.apply_chat_template(
        chat.messages,
        chat.add_generation_prompt,
        add_special_tokens=chat.add_special_tokens,
        continue_final_message=chat.continue_final_message,
        template_kwargs=chat.template_kwargs,
    )
    return Prompt(ids, grammar=chat.grammar, make_reader=PlainReader)
