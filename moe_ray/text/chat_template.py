"""Chat templates: the checkpoint's own through transformers, and Mistral's formats for checkpoints without one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from moe_ray.errors import InvalidRequest
from moe_ray.text.answers.formats import FORMATS, CallFormat, format_taught_by
from moe_ray.text.answers.tools import Tool
from moe_ray.text.messages import Message, plain_messages, with_system_in_first_user_turn
from moe_ray.text.mistral_formats import mistral_format
from moe_ray.text.tool_turns import as_plain_turns, with_short_ids

RESERVED_KWARGS: Final = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}
_READS_TOOLS: Final = re.compile(r"\{[%{][^%}]*\btools\b")
_TOOL_TEMPLATE: Final = "tool_use"
"""transformers' name of the template for conversations with tools, where a checkpoint has several."""


class ChatTemplate:
    """Renders conversations to text for one checkpoint. Thread-safe."""

    def __init__(self, tokenizer: Any, vocabulary: Path, tool_call_parser: str = "auto") -> None:
        """`tokenizer` is transformers'; `vocabulary` the file it was read from.

        `tool_call_parser`: a name of `FORMATS`; "auto": the format that the template teaches, else JSON.
        """
        self._tokenizer = tokenizer
        self._built_in = None if tokenizer.chat_template else mistral_format(tokenizer, vocabulary)
        self._variables: Mapping[str, Any] = {}
        if self._built_in is not None:
            special = "[INST]" if "[INST]" in tokenizer.get_vocab() else tokenizer.bos_token
            self._variables = self._built_in.variables(tokenizer.backend_tokenizer, special)
        self.exists = bool(tokenizer.chat_template or self._built_in)
        taught = self._taught()
        chosen = taught or "json" if tool_call_parser == "auto" else tool_call_parser
        self.call_format: CallFormat = FORMATS[chosen]
        """How the model is to write calls of tools."""
        self.knows_tools = taught == chosen
        """The template tells the model of tools; else moe_ray's own text does."""
        self.source = str(tokenizer.chat_template or (self._built_in.template if self._built_in else ""))
        """Jinja; "" where there is none."""

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Tool] = (),
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation; `template_kwargs` are variables for the template.

        A template that refuses the system role gets the system text in front of the first user turn, as Mistral's own
        code does. Raises `InvalidRequest` with the template's message, or naming the part of `messages` that is wrong.
        """
        if not self.exists:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", "messages")
        variables = dict(template_kwargs or {})
        if reserved := sorted(RESERVED_KWARGS & variables.keys()):
            raise InvalidRequest(f"`chat_template_kwargs` may not set {', '.join(reserved)}", "chat_template_kwargs")
        variables |= self._variables
        if documents is not None:
            variables["documents"] = list(documents)
        chat = plain_messages(messages)
        if not self.knows_tools:
            chat = as_plain_turns(chat, tools, self.call_format.written)
        else:
            if self.call_format.syntax.short_ids:
                chat = with_short_ids(chat)
            variables["tools"] = [tool.described() for tool in tools] or None

        def render(chat: list[dict[str, Any]]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                chat if self._built_in is None else self._built_in.prepared(chat),
                chat_template=None if self._built_in is None else self._built_in.template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
            return text

        try:
            try:
                return render(chat)
            except TemplateError:
                merged = with_system_in_first_user_turn(chat)
                if merged is None:
                    raise
                return render(merged)
        except (TemplateError, ValueError, TypeError, LookupError) as exc:
            raise InvalidRequest(f"The chat template refused the messages: {exc}", "messages") from exc

    def _taught(self) -> str | None:
        """The name of the format of calls that the template teaches; None: it knows no tools, or no format of ours."""
        if self._built_in is not None:
            return "mistral" if self._built_in.takes_tools else None
        template: Any = self._tokenizer.chat_template or ""
        if isinstance(template, dict):
            template = template.get(_TOOL_TEMPLATE, template.get("default", ""))
        return format_taught_by(template) if _READS_TOOLS.search(template) else None
