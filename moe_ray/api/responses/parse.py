"""From the body of POST /v1/responses to a `GenerationJob`, and what its response repeats of it."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from moe_ray.api.chat import ChatInput, Tool, ToolChoice, chat_prompt
from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, make_job
from moe_ray.api.responses.body import request_echo
from moe_ray.api.responses.conversation import Item, items_of, messages_of, turn_starts, without_first_turns
from moe_ray.api.responses.further_fields import INSTEAD, SAMPLING, UNSUPPORTED, UNTOLD
from moe_ray.api.responses.schemas import (
    LOGPROBS,
    AllowedTools,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponsesRequest,
)
from moe_ray.api.sampling_fields import sampling_given
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import Grammar
from moe_ray.text.bad_words import with_bad_words
from moe_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PlannedResponse:
    """What one request comes to."""

    job: GenerationJob
    echo: dict[str, Any]
    """The fields of the response that repeat the request."""
    items: list[Item]
    """Of its input."""


def parse_request(raw: bytes) -> ResponsesRequest:
    """Validate a body; raises `InvalidRequest` with the field in `param`."""
    try:
        body = ResponsesRequest.model_validate_json(raw)
    except ValidationError as error:
        raise _invalid(error) from None
    for name in body.model_extra or {}:
        if name in INSTEAD:
            raise InvalidRequest(f"`{name}` is unknown here: use `{INSTEAD[name]}`", name, "unsupported_parameter")
        if name in UNSUPPORTED or name in UNTOLD:
            raise InvalidRequest(f"`{name}` is not supported", name, "unsupported_parameter")
        if name not in SAMPLING:
            raise InvalidRequest(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` is only allowed when `stream` is true", "stream_options")
    if body.background and body.store is False:
        raise InvalidRequest("`background` needs `store` to be true: its result is asked for later", "background")
    return body


def plan_response(
    body: ResponsesRequest, history: Sequence[Item], tokenizer: Tokenizer, limits: ModelLimits, job_id: str
) -> PlannedResponse:
    """Turn a validated body and the items before it into a job. Tokenizes on the calling thread.

    Raises `InvalidRequest` for what needs the tokenizer or the model to be seen.
    """
    items = items_of(body)
    given = sampling_given(body.model_extra, SAMPLING)
    given |= {name: getattr(body, name) for name in ("temperature", "top_p") if getattr(body, name) is not None}
    sampling = SamplingParams(
        **{
            **tokenizer.sampling_defaults,
            **given,
            "max_tokens": body.max_output_tokens,
            "logprobs": body.top_logprobs if LOGPROBS in body.include or body.top_logprobs else None,
        }
    )
    prompt = _prompt(chat_of(body, [*history, *items]), body, tokenizer, limits)
    sampling = with_bad_words(sampling, tokenizer)
    job = make_job(job_id, [prompt], sampling, limits, prompt_field="input", stream=True)
    return PlannedResponse(job, request_echo(body, sampling), items)


def chat_of(body: ResponsesRequest, items: Sequence[Item]) -> ChatInput:
    """The conversation that `items` and the instructions of a body make, with its tools and the form of its answer."""
    tools, choice = _tools(body)
    messages = messages_of(body.instructions, items)
    return ChatInput(messages, tools, choice, _grammar(body), tool_path="tools[{}]")


def of_this_api(error: Exception, body: ResponsesRequest) -> Exception:
    """An error, by this API's name for what the trunk knows as the grammar."""
    if not isinstance(error, InvalidRequest) or error.param != "grammar":
        return error
    field = "tools" if _grammar(body) is None else "text.format"
    return InvalidRequest(str(error).replace("`grammar`", f"`{field}`"), field, error.code)


def _prompt(chat: ChatInput, body: ResponsesRequest, tokenizer: Tokenizer, limits: ModelLimits) -> Prompt:
    """The prompt; with `truncation: auto` without as many first turns as must go."""

    def prompt_of(start: int) -> Prompt:
        try:
            return chat_prompt(replace(chat, messages=without_first_turns(chat.messages, start)), tokenizer)
        except InvalidRequest as error:
            param = "input" if (error.param or "").startswith("messages") else error.param
            raise InvalidRequest(str(error), param, error.code) from None

    room = limits.max_model_len - (body.max_output_tokens or 1)
    whole = prompt_of(0)
    if body.truncation == "disabled" or len(whole.token_ids) <= room:
        return whole
    starts = turn_starts(chat.messages)
    if not starts:
        return whole
    fits = bisect.bisect_left(starts, True, key=lambda start: len(prompt_of(start).token_ids) <= room)
    return prompt_of(starts[min(fits, len(starts) - 1)])


def _tools(body: ResponsesRequest) -> tuple[tuple[Tool, ...], ToolChoice]:
    empty = {"type": "object", "properties": {}}
    tools = {
        tool.name: Tool(tool.name, tool.description or "", tool.parameters or empty, bool(tool.strict))
        for tool in body.tools
    }
    if len(tools) < len(body.tools):
        raise InvalidRequest("`tools` holds two functions of one name", "tools")
    choice, parallel = body.tool_choice, body.parallel_tool_calls
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidRequest("`tool_choice` is `required`, but `tools` holds none", "tool_choice")
        return tuple(tools.values()), ToolChoice(choice, parallel=parallel)
    named = [tool.name for tool in choice.tools] if isinstance(choice, AllowedTools) else [choice.name]
    for name in named:
        if name not in tools:
            raise InvalidRequest(f"`tool_choice` names `{name}`, which is not in `tools`", "tool_choice")
    if isinstance(choice, AllowedTools):
        return tuple(tools[name] for name in dict.fromkeys(named)), ToolChoice(choice.mode, parallel=parallel)
    return tuple(tools.values()), ToolChoice("named", choice.name, parallel)


def _grammar(body: ResponsesRequest) -> Grammar | None:
    given = body.text.format
    if isinstance(given, JsonSchemaFormat):
        return Grammar("json_schema", json.dumps(given.schema_, ensure_ascii=False))
    return Grammar("json_object") if isinstance(given, JsonObjectFormat) else None


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    where = ""
    for step in first["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif not step.startswith("<") and step != "[key]":  # the tag of a union's member, or a mapping's key
            where += f".{step}" if where else step
    if not where:
        return InvalidRequest(f"The body is not a valid JSON object: {first['msg']}")
    context = first.get("ctx", {})
    match first["type"]:
        case "missing":
            return InvalidRequest(f"`{where}` is required", where, "missing_required_parameter")
        case "union_tag_invalid":
            tag, tags = context["tag"], context["expected_tags"].replace("'", "")
            said = f"`{where}` of type {tag} is not supported; supported: {tags}"
            return InvalidRequest(said.replace("<", "`").replace(">", "`"), where, "invalid_value")
        case "union_tag_not_found":
            return InvalidRequest(f"`{where}` {_shape_of(where)}", where, "invalid_type")
        case "literal_error":
            allowed = context["expected"].replace("'", "`")
            return InvalidRequest(
                f"`{where}` {first['input']!r} is not supported; supported: {allowed}", where, "invalid_value"
            )
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return InvalidRequest(f"`{where}`: {first['msg']}", where, code)


def _shape_of(where: str) -> str:
    if where == "tool_choice":
        return "must be `none`, `auto`, `required` or an object with a `type`"
    if where.endswith("]") or where == "text.format":
        return "must be an object with a `type`"
    return "must be a string or a list of objects with a `type`"
