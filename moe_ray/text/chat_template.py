"""Chat templates: the checkpoint's own through transformers, and Mistral's formats for checkpoints without one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from moe_ray.errors import InvalidRequest
from moe_ray.model.json_files import read_json_object
from moe_ray.text.messages import Message, plain_messages, with_system_in_first_user_turn

RESERVED_KWARGS: Final = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages"
}

# Mistral's formats by tokenizer version, as mistral_common's InstructTokenizerV1, V2, V3 and V7 write plain text. It
# encodes each piece by itself; GAP is what makes this tokenizer encode a piece behind a special token the same way.
_PREPARE = """
{{- bos_token -}}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | select -%}
{%- set system = system | join('\n\n') -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- if not turns -%}{{ raise_exception('There must be a user message') }}{%- endif -%}
{%- for m in turns -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('After the optional system message, conversation roles must alternate'
                            ~ ' user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if m['role'] not in ('user', 'assistant') -%}
        {{- raise_exception('Only user and assistant roles are supported') -}}
    {%- endif -%}
{%- endfor -%}
"""
_V1 = (
    _PREPARE
    + """
{%- for m in turns -%}
    {%- if m['role'] == 'user' -%}
        {{- 'GAP[INST] ' ~ (system ~ '\n\n' if system and loop.first else '') ~ m['content'] ~ ' [/INST]' -}}
    {%- else -%}
        {{- (' ' ~ m['content'] if m['content'] else '') ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)
# Spaces at the end of an answer are dropped, but not of the one that is to be continued.
_TURN = """
{%- if m['role'] == 'user' -%}
    {{- '[INST]' ~ text ~ '[/INST]' -}}
{%- else -%}
    {{- (text if loop.last else text.rstrip(' ')) ~ eos_token -}}
{%- endif -%}
"""
_V3 = (
    _PREPARE
    + """
{%- for m in turns -%}
    {%- set system_here = system and m['role'] == 'user' and loop.revindex <= 2 -%}
    {%- set text = (system ~ '\n\n' if system_here else '') ~ m['content'] -%}
    {%- set text = 'GAP' ~ text if text else '' -%}
    TURN
{%- endfor -%}
"""
)
_V7 = (
    _PREPARE
    + """
{%- for m in messages -%}
    {%- set text = 'GAP' ~ m['content'] if m['content'] else '' -%}
    {%- if m['role'] == 'system' -%}
        {{- '[SYSTEM_PROMPT]' ~ text ~ '[/SYSTEM_PROMPT]' -}}
    {%- else -%}
        TURN
    {%- endif -%}
{%- endfor -%}
"""
)
_TEKKEN_VERSIONS: Final = {"v3": _V3, "v7": _V7, "v11": _V7, "v13": _V7}


class ChatTemplate:
    """Renders conversations to text for one checkpoint. Thread-safe."""

    def __init__(self, tokenizer: Any, vocabulary: Path) -> None:
        """`tokenizer` is transformers'; `vocabulary` the file it was read from."""
        self._tokenizer = tokenizer
        self._built_in = None if tokenizer.chat_template else _mistral_format(tokenizer, vocabulary)
        self.exists = bool(tokenizer.chat_template or self._built_in)
        self.source = str(tokenizer.chat_template or self._built_in or "")
        """Jinja; "" where there is none."""

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
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
        chat = plain_messages(messages)

        def render(chat: list[dict[str, Any]]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                chat,
                chat_template=self._built_in,
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


def _mistral_format(tokenizer: Any, vocabulary: Path) -> str | None:
    """The template of Mistral's format that this vocabulary was trained for; None for other vocabularies."""
    known = tokenizer.get_vocab()
    template: str | None
    if vocabulary.name == "tekken.json":
        template = _TEKKEN_VERSIONS.get(read_json_object(vocabulary)["config"].get("version"))
    elif "[INST]" in known:
        template = _V7 if "[SYSTEM_PROMPT]" in known else _V3
    else:
        # "INST" is one piece in the sentencepiece models that were trained on this format; byte-level ones have it too
        template = _V1 if "INST" in known and tokenizer.bos_token == "<s>" else None
    if template is None:
        return None
    special = "[INST]" if "[INST]" in known else tokenizer.bos_token
    return template.replace("TURN", _TURN).replace("GAP", _gap(tokenizer.backend_tokenizer, special))


def _gap(backend: Any, special: str) -> str:
    """What stands between a special token and a text so that the text gets the ids it has by itself.

    Sentencepiece puts a space in front of every text. So do tokenizer.json files of before mid 2024 for every text
    behind a special token; those of today do it only at the very start, and Tekken never does.
    """

    def ids(text: str) -> list[int]:
        encoded: list[int] = backend.encode(text, add_special_tokens=False).ids
        return encoded

    return next((gap for gap in ("", " ") if ids(f"{special}{gap}x")[1:] == ids("x")), "")
