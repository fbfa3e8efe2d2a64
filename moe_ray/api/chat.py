"""A turn of a conversation as every chat API asks for it: what is said, the tools, what the answer may be.

An API parses its own body into a `ChatInput`; `chat_prompt` makes the prompt, the grammar that the answer must match,
and the reader that takes the answer apart. The parts are in `Delta.parts` and `ChoiceOutput.answer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from moe_ray.api.job import Prompt
from moe_ray.engine.grammar.schema_rules import unsupported
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.answers.formats import CallFormat
from moe_ray.text.answers.parts import PlainReader
from moe_ray.text.answers.structure import ANY_OBJECT, CallShape, Structure, either, grammar_of, structure_of
from moe_ray.text.answers.tools import AUTO, Tool, ToolChoice, check_tools
from moe_ray.text.messages import Message
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.tool_turns import check_tool_turns

__all__ = ["ChatInput", "Tool", "ToolChoice", "chat_prompt"]

TOOL_PATH: Final = "tools[{}].function"
"""What a tool of a number is called in errors, unless an API calls it otherwise."""


@dataclass(frozen=True, slots=True)
class ChatInput:
    """One conversation that waits for an answer."""

    messages: Sequence[Message]
    """In the form that chat templates take: {role, content, tool_calls: [{id, type, function: {name, arguments}}],
    tool_call_id, name}; a call's `arguments` are a JSON object, not its text."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO
    grammar: Grammar | None = None
    """What the text of the answer must match (`response_format`); calls of tools are calls beside it."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: Sequence[Mapping[str, Any]] | None = None
    """What templates for retrieval are given."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_path: str = TOOL_PATH


def chat_prompt(chat: ChatInput, tokenizer: Tokenizer) -> Prompt:
    """Render and tokenize a conversation; what its answer must match, and what takes it apart.

    Raises `InvalidRequest` as `Tokenizer.apply_chat_template` does, and for tools and calls that do not fit together.
    """
    choice = chat.tool_choice
    check_tools(chat.tools, choice, chat.tool_path)
    check_tool_turns(chat.messages)
    tools = () if choice.mode == "none" else chat.tools
    ids = tokenizer.apply_chat_template(
        chat.messages,
        chat.add_generation_prompt,
        tools=tools,
        documents=chat.documents,
        add_special_tokens=chat.add_special_tokens,
        continue_final_message=chat.continue_final_message,
        template_kwargs=chat.template_kwargs,
    )
    if not tools:
        return Prompt(ids, grammar=chat.grammar, make_reader=PlainReader)
    call_format = tokenizer.chat_template.call_format
    make_reader = partial(
        call_format.reader,
        frozenset(tool.name for tool in tools),
        tokenizer.special_tokens,
        choice.several,
        exact=choice.mode == "auto" and chat.grammar is None and _is_strict(tools),
    )
    return Prompt(ids, grammar=_grammar(chat, call_format, tokenizer.special_tokens), make_reader=make_reader)


def _is_strict(tools: Sequence[Tool]) -> bool:
    return any(tool.strict for tool in tools)


def _grammar(chat: ChatInput, call_format: CallFormat, tokens: Mapping[str, int]) -> Grammar | None:
    """What an answer must match where there are tools."""
    structure = _structure(chat, call_format, tokens)
    try:
        return None if structure is None else grammar_of(structure)
    except InvalidRequest as error:
        raise InvalidRequest(f"`tools` and the format of the answer are too large: {error}", "tools") from None


def _structure(chat: ChatInput, call_format: CallFormat, tokens: Mapping[str, int]) -> Structure | None:
    choice, tools = chat.tool_choice, chat.tools
    if choice.mode in ("required", "named"):
        callable_tools = [tool for tool in tools if choice.mode == "required" or tool.name == choice.name]
        # A schema that cannot be held to must not make the request fail, unless that was asked for.
        held = {
            tool.name: tool.parameters if tool.strict or unsupported(tool.parameters) is None else ANY_OBJECT
            for tool in callable_tools
        }
        must = CallShape(held, choice.several, tokens)
        return call_format.calls(must)
    arguments = {tool.name: tool.parameters if tool.strict else ANY_OBJECT for tool in tools}
    may = CallShape(arguments, choice.several, tokens)
    if chat.grammar is not None:
        return either([structure_of(chat.grammar), call_format.calls(may)])
    return call_format.text_with_calls(may) if call_format.has_marker or _is_strict(tools) else None
