"""Mistral's chat formats, for checkpoints that come without a template: by tokenizer version, as mistral_common writes.

mistral_common encodes each piece by itself; `gap` is what makes this tokenizer encode a piece behind a special token
the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_ray.model.json_files import read_json_object
from moe_ray.text.tool_turns import in_order_of_calls

_PREPARE = """
{{- bos_token -}}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | select -%}
{%- set system = system | join('\n\n') -%}
{%- set seen = namespace(last='', first_user=-1, last_user=-1) -%}
{%- for m in messages if m['role'] != 'system' -%}
    {%- if m['role'] not in ('user', 'assistant', 'tool') -%}
        {{- raise_exception('Only user and assistant roles are supported') -}}
    {%- endif -%}
    {%- set follows = {'user': ('', 'assistant', 'tool'), 'assistant': ('user', 'tool'), 'tool': ('calls', 'tool')} -%}
    {%- if seen.last not in follows[m['role']] -%}
        {{- raise_exception('After the optional system message, conversation roles must alternate'
                            ~ ' user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set seen.last = 'calls' if m['calls'] else m['role'] -%}
{%- endfor -%}
{%- if not seen.last -%}{{ raise_exception('There must be a user message') }}{%- endif -%}
{%- for m in messages if m['role'] == 'user' -%}
    {%- set seen.first_user = m['place'] if loop.first else seen.first_user -%}
    {%- set seen.last_user = m['place'] -%}
{%- endfor -%}
"""
_V1 = (
    _PREPARE
    + """
{%- for m in messages -%}
    {%- if m['role'] == 'user' -%}
        {%- set before = system ~ '\n\n' if system and m['place'] == seen.first_user else '' -%}
        {{- mistral.gap ~ '[INST] ' ~ before ~ m['content'] ~ ' [/INST]' -}}
    {%- elif m['role'] == 'assistant' -%}
        {{- (' ' ~ m['content'] if m['content'] else '') ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
)
# Spaces at the end of an answer are dropped, but not of the one that is to be continued.
_WITH_TOKENS = (
    _PREPARE
    + """
{%- for m in messages -%}
    {%- if m['role'] == 'system' -%}
        {%- if mistral.system_token -%}
            {{- '[SYSTEM_PROMPT]' ~ (mistral.gap ~ m['content'] if m['content'] else '') ~ '[/SYSTEM_PROMPT]' -}}
        {%- endif -%}
    {%- elif m['role'] == 'user' -%}
        {%- if tools and m['place'] == (seen.first_user if mistral.tools_first else seen.last_user) -%}
            {{- '[AVAILABLE_TOOLS]' ~ mistral.gap ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {%- set with_system = system and not mistral.system_token and m['place'] == seen.last_user -%}
        {%- set text = (system ~ '\n\n' if with_system else '') ~ m['content'] -%}
        {{- '[INST]' ~ (mistral.gap ~ text if text else '') ~ '[/INST]' -}}
    {%- elif m['role'] == 'assistant' -%}
        {%- set text = mistral.gap ~ m['content'] if m['content'] else '' -%}
        {{- text if loop.last else text.rstrip(' ') -}}
        {%- if m['calls'] and not mistral.named -%}
            {{- '[TOOL_CALLS]' ~ mistral.gap ~ (m['calls'] | tojson) -}}
        {%- endif -%}
        {%- for call in m['calls'] if mistral.named -%}
            {{- '[TOOL_CALLS]' ~ mistral.gap ~ call['name'] -}}
            {{- '[CALL_ID]' ~ mistral.gap ~ call['id'] if mistral.call_ids else '' -}}
            {{- '[ARGS]' ~ mistral.gap ~ (call['arguments'] | tojson) -}}
        {%- endfor -%}
        {{- eos_token -}}
    {%- else -%}
        {{- '[TOOL_RESULTS]' ~ (mistral.gap ~ m['tool_call_id'] ~ '[TOOL_CONTENT]' if mistral.id_token else '') -}}
        {{- mistral.gap ~ m['result'] ~ '[/TOOL_RESULTS]' -}}
    {%- endif -%}
{%- endfor -%}
"""
)


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """The format of one tokenizer version."""

    template: str = _WITH_TOKENS
    system_token: bool = True
    """System texts stand between tokens of their own, not in a user's turn."""
    named: bool = False
    """Calls are a name and arguments, each behind its token, not a JSON array."""
    call_ids: bool = False
    """Calls that are `named` have ids."""
    id_token: bool = False
    """A result's id stands before a token, not in JSON beside it."""
    json_results: bool = False
    """A result is JSON with the id of its call."""
    tools_first: bool = False
    """Tools are told before the first user's turn, not the last."""

    @property
    def takes_tools(self) -> bool:
        return self.template is _WITH_TOKENS

    def variables(self, backend: Any, special: str) -> Mapping[str, Any]:
        """What the template must be given; `special` is a special token of the tokenizer `backend`."""
        said = {name: getattr(self, name) for name in self.__slots__ if name != "template"}
        return {"mistral": {**said, "gap": _gap(backend, special)}}

    def prepared(self, chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation as the template reads it: calls and results as this format writes them."""
        chat = in_order_of_calls(chat) if self.named else list(chat)
        return [{**message, "place": i, **self._tool_parts(message)} for i, message in enumerate(chat)]

    def _tool_parts(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            content = message["content"]
            if not self.json_results:
                return {"result": content}
            return {"result": _dumped({"content": _as_json(content or "{}"), "call_id": message.get("tool_call_id")})}
        calls = message.get("tool_calls") or ()
        return {"calls": [{**call["function"], "id": call["id"]} for call in calls]}


_V1_FORMAT: Final = MistralFormat(_V1)
_V3: Final = MistralFormat(system_token=False, json_results=True)
_V7: Final = MistralFormat(id_token=True)
_TEKKEN: Final = {
    "v3": _V3,
    "v7": _V7,
    "v11": MistralFormat(named=True, call_ids=True, id_token=True),
    "v13": MistralFormat(named=True, tools_first=True),
}


def mistral_format(tokenizer: Any, vocabulary: Path) -> MistralFormat | None:
    """The format that this vocabulary was trained for; None for other vocabularies.

    Version 2 has version 3's tokens, and the published checkpoints with that vocabulary were trained on version 3.
    """
    known = tokenizer.get_vocab()
    if vocabulary.name == "tekken.json":
        return _TEKKEN.get(read_json_object(vocabulary)["config"].get("version"))
    if "[INST]" in known:
        return _V7 if "[SYSTEM_PROMPT]" in known else _V3
    # "INST" is one piece in the sentencepiece models that were trained on this format; byte-level ones have it too
    return _V1_FORMAT if "INST" in known and tokenizer.bos_token == "<s>" else None


def _as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _gap(backend: Any, special: str) -> str:
    """What stands between a special token and a text so that the text gets the ids it has by itself.

    Sentencepiece puts a space in front of every text. So do tokenizer.json files of before mid 2024 for every text
    behind a special token; those of today do it only at the very start, and Tekken never does.
    """

    def ids(text: str) -> list[int]:
        encoded: list[int] = backend.encode(text, add_special_tokens=False).ids
        return encoded

    return next((gap for gap in ("", " ") if ids(f"{special}{gap}x")[1:] == ids("x")), "")
