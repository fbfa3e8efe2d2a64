"""From the body of a request to Anthropic's API to a `GenerationJob`."""

from __future__ import annotations

import json
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from moe_ray.api.anthropic.schemas import (
    HARMLESS,
    NEUTRAL,
    SAMPLING,
    CustomTool,
    MessagesRequest,
    PromptRequest,
    ToolChoiceSetting,
)
from moe_ray.api.anthropic.turns import template_messages
from moe_ray.api.chat import ChatInput, Tool, ToolChoice, chat_prompt
from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, make_job
from moe_ray.api.sampling_fields import sampling_given
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.bad_words import with_bad_words
from moe_ray.text.tokenizer import Tokenizer

_B = TypeVar("_B", bound=PromptRequest)

_MODES: Final = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}
_TAGS: Final = frozenset({"text", "thinking", "redacted_thinking", "tool_use", "tool_result"})
_NO_THINKING: Final = "thinking: this model does not think; leave it out, or send {'type': 'disabled'} or 'adaptive'"


def parse_messages(body: bytes) -> MessagesRequest:
    """Validate the body of /v1/messages. Raises `InvalidRequest` naming the field."""
    return _parse(MessagesRequest, body)


def parse_count(body: bytes) -> PromptRequest:
    """Validate the body of /v1/messages/count_tokens, which may be a body of /v1/messages as well."""
    return _parse(PromptRequest, body)


def count(body: PromptRequest, tokenizer: Tokenizer) -> int:
    """The tokens of the prompt. Raises `InvalidRequest`."""
    return len(_prompt(body, tokenizer).token_ids)


def to_job(body: MessagesRequest, tokenizer: Tokenizer, limits: ModelLimits, job_id: str) -> GenerationJob:
    """Turn a validated body into a job of one choice. Tokenizes on the calling thread. Raises `InvalidRequest`.

    An answer that would be longer than the context allows ends where the context does: agents ask for tens of
    thousands of tokens, whatever the model.
    """
    prompt = _prompt(body, tokenizer)
    left = limits.max_model_len - len(prompt.token_ids)
    if left < 1:  # agents look for these words to shorten their conversation
        raise InvalidRequest(
            f"prompt is too long: {len(prompt.token_ids)} tokens > {limits.max_model_len - 1} maximum", "messages"
        )
    given = sampling_given(body.model_extra, SAMPLING)
    given |= {"max_tokens": min(body.max_tokens, left), "stop": body.stop_sequences}
    sampling = with_bad_words(SamplingParams(**{**tokenizer.sampling_defaults, **given}), tokenizer)
    return make_job(job_id, [prompt], sampling, limits, prompt_field="messages", stream=body.stream)


def _prompt(body: PromptRequest, tokenizer: Tokenizer) -> Prompt:
    messages = template_messages(body.system, body.messages)
    if not messages or messages[-1]["role"] == "system":
        raise InvalidRequest("messages: there is no turn of the user", "messages")
    last = messages[-1]
    prefilled = last["role"] == "assistant"
    if prefilled and (last.get("tool_calls") or not last["content"]):
        raise InvalidRequest(
            "messages: the last turn is the assistant's and would be continued, so it must end with text", "messages"
        )
    chat = ChatInput(
        messages,
        tools=tuple(map(_tool, body.tools)),
        tool_choice=_tool_choice(body.tool_choice, body.tools),
        tool_path="tools.{}",
        grammar=_grammar(body),
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
    )
    return chat_prompt(chat, tokenizer)


def _tool(tool: CustomTool) -> Tool:
    return Tool(tool.name, tool.description, tool.input_schema, tool.strict)


def _tool_choice(choice: ToolChoiceSetting | None, tools: list[CustomTool]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    if choice.type in ("any", "tool") and not tools:
        raise InvalidRequest("tool_choice: there are no `tools` to choose from", "tool_choice")
    if (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequest("tool_choice.name: goes with the type `tool`, and with no other", "tool_choice")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        raise InvalidRequest(f"tool_choice.name: no tool is called {choice.name!r}", "tool_choice")
    return ToolChoice(_MODES[choice.type], choice.name or "", not choice.disable_parallel_tool_use)


def grammar_field(body: PromptRequest) -> str:
    """What of a body an answer's grammar was made of."""
    if body.tools:
        return "tools"
    return "output_format" if body.output_format else "output_config.format"


def _grammar(body: PromptRequest) -> Grammar | None:
    wanted = body.output_format or (body.output_config.format if body.output_config else None)
    return None if wanted is None else Grammar("json_schema", json.dumps(wanted.json_schema))


def _parse(kind: type[_B], body: bytes) -> _B:
    try:
        request = kind.model_validate_json(body)
    except ValidationError as exc:
        raise _invalid(exc) from None
    _refuse_unsupported(request)
    return request


def _refuse_unsupported(request: PromptRequest) -> None:
    known = {*HARMLESS, *NEUTRAL, *SAMPLING, "context_management", *MessagesRequest.model_fields}
    for name, value in (request.model_extra or {}).items():
        if name not in known:
            raise InvalidRequest(f"{name}: this field is not supported", name)
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise InvalidRequest(f"{name}: {value!r} is not supported", name)
        if name == "context_management":
            _check_edits(value)


def _check_edits(management: Any) -> None:
    """Raise `InvalidRequest` for edits of the conversation, other than to leave out thinking, as every prompt does."""
    edits = management.get("edits") or [] if isinstance(management, dict) else None
    if not isinstance(edits, list):
        raise InvalidRequest("context_management: must be an object with `edits`, a list", "context_management")
    for edit in edits:
        kind = edit.get("type") if isinstance(edit, dict) else edit
        if not str(kind).startswith("clear_thinking_"):
            raise InvalidRequest(f"context_management.edits: {kind!r} is not supported", "context_management")


def _invalid(exc: ValidationError) -> InvalidRequest:
    first = exc.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return InvalidRequest(f"The body is not a valid JSON object: {first['msg']}")
    param = str(first["loc"][0])
    # The members of a union that pydantic tried are no part of the place.
    place = [str(each) for i, each in enumerate(first["loc"]) if not _is_tag(first["loc"], i)]
    where = ".".join(place)
    if first["type"] == "missing":
        return InvalidRequest(f"{where}: Field required", param)
    if first["type"] == "union_tag_invalid":
        kind, known = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return InvalidRequest(f"{where}: blocks of type {kind!r} are not supported, only {known}", param)
    if param == "thinking":
        return InvalidRequest(_NO_THINKING, param)
    if param == "tools" and where.endswith(".type"):
        return InvalidRequest(f"{where}: tools that the server runs are not supported, only custom ones", param)
    return InvalidRequest(f"{where}: {first['msg']}", param)


def _is_tag(place: tuple[int | str, ...], i: int) -> bool:
    """Whether a part of an error's place is the type of a block, which stands behind the block's number."""
    return place[i] in _TAGS and isinstance(place[i - 1], int)
