"""From the body of a request to OpenAI's API to a `GenerationJob`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from moe_ray.api.chat import ChatInput, chat_prompt
from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, ReportOptions, make_job
from moe_ray.api.openai.schemas import UNION_RULES, UNSUPPORTED, Body, ChatRequest, CompletionRequest
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import MAX_LOGPROBS
from moe_ray.text.tokenizer import Tokenizer

_B = TypeVar("_B", CompletionRequest, ChatRequest)

_SAMPLING: Final = frozenset(each.name for each in fields(SamplingParams))
COMPLETION_TOKENS: Final = 16
"""Of a completion that does not say how many."""


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate the body of /v1/completions; raises `InvalidRequest` with the field in `param`."""
    request = _parse(CompletionRequest, body)
    if request.echo and "logprobs" in (request.model_extra or {}):
        raise InvalidRequest("`echo` with `logprobs` is not supported: prompt tokens have no logprobs here", "echo")
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """Validate the body of /v1/chat/completions; raises `InvalidRequest` with the field in `param`."""
    request = _parse(ChatRequest, body)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    for message in request.messages:
        extra = message.model_extra or {}
        if message.role in ("tool", "function") or extra.get("tool_calls") or extra.get("function_call"):
            raise InvalidRequest("tool calls in `messages` are not supported", "messages")
    return request


def to_job(body: Body, tokenizer: Tokenizer, limits: ModelLimits, job_id: str) -> GenerationJob:
    """Turn a validated body into a job: n choices for each prompt, in OpenAI's order.

    Tokenizes on the calling thread. Raises `InvalidRequest` for what needs the tokenizer or the model to be seen.
    """
    chat = isinstance(body, ChatRequest)
    sampling = SamplingParams(**{**tokenizer.sampling_defaults, **_given(body)})
    options = body.stream_options
    return make_job(
        job_id,
        _chat_prompts(body, tokenizer) if isinstance(body, ChatRequest) else _prompts(body, tokenizer),
        sampling,
        limits,
        prompt_field="messages" if chat else "prompt",
        n=body.n,
        stream=body.stream,
        report=None if options is None else ReportOptions(options.include_usage, options.continuous_usage_stats),
    )


def _given(body: Body) -> dict[str, Any]:
    """The sampling parameters of a body, unchecked."""
    given = {name: value for name, value in (body.model_extra or {}).items() if name in _SAMPLING}
    if isinstance(body, CompletionRequest):
        return {"max_tokens": COMPLETION_TOKENS, **given}
    given["logprobs"] = _top_logprobs(body)
    most = given.get("max_tokens") if body.max_completion_tokens is None else body.max_completion_tokens
    if most is not None and isinstance(most, int) and most < 1:
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(f"`{field}` must be at least 1, got {most}", field)
    return {**given, "max_tokens": most}


def _top_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"`top_logprobs` must be between 0 and {MAX_LOGPROBS}", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def _parse(kind: type[_B], body: bytes) -> _B:
    try:
        request = kind.model_validate_json(body)
    except ValidationError as exc:
        raise _invalid(exc) from None
    _refuse_unsupported(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` is only allowed when `stream` is true", "stream_options")
    return request


def _invalid(exc: ValidationError) -> InvalidRequest:
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        return InvalidRequest(f"The body is not a valid JSON object: {first['msg']}")
    param = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return InvalidRequest(f"`{param}` is required", param)
    if param in UNION_RULES and first["type"] != "literal_error":
        return InvalidRequest(f"`{param}` {UNION_RULES[param]}", param)
    return InvalidRequest(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}", param)


def _refuse_unsupported(request: Body) -> None:
    extra = request.model_extra or {}
    if extra.get("tool_choice") == "none":  # the model is told not to use them
        extra = {k: v for k, v in extra.items() if k != "tools"}
    if extra.get("function_call") == "none":
        extra = {k: v for k, v in extra.items() if k != "functions"}
    for name, neutral in UNSUPPORTED.items():
        if name in extra and extra[name] not in neutral:
            raise InvalidRequest(f"`{name}` is not supported", name)
    if extra.get("best_of", request.n) != request.n:
        raise InvalidRequest("`best_of` other than `n` is not supported", "best_of")
    if isinstance(request, ChatRequest) and extra.get("echo"):
        raise InvalidRequest("`echo` is not supported for chat completions", "echo")


def _chat_prompts(body: ChatRequest, tokenizer: Tokenizer) -> list[Prompt]:
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    for message in messages:
        if message["role"] == "developer":  # OpenAI's newer name for system, unknown to templates
            message["role"] = "system"
    chat = ChatInput(
        messages,
        add_generation_prompt=body.add_generation_prompt,
        add_special_tokens=body.add_special_tokens,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
    )
    return [chat_prompt(chat, tokenizer)]


def _prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    given: Any = body.prompt
    batch = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    return [_prompt(each, body, tokenizer) for each in (given if batch else [given])]


def _prompt(given: str | Sequence[int], body: CompletionRequest, tokenizer: Tokenizer) -> Prompt:
    if isinstance(given, str):
        return Prompt(tokenizer.encode(given, body.add_special_tokens), given if body.echo else "")
    return Prompt(given, tokenizer.decode(given) if body.echo else "")
