"""From the body of a request to OpenAI's API to a `GenerationJob`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, ReportOptions, make_job
from moe_ray.api.openai.conversations import chat_prompts
from moe_ray.api.openai.schemas import (
    SAMPLING,
    UNION_RULES,
    UNSUPPORTED,
    BatchChatRequest,
    Body,
    ChatFields,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
)
from moe_ray.api.sampling_fields import sampling_given
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import MAX_LOGPROBS
from moe_ray.text.bad_words import with_bad_words
from moe_ray.text.tokenizer import Tokenizer

_B = TypeVar("_B", CompletionRequest, ChatRequest, BatchChatRequest)
_C = TypeVar("_C", ChatRequest, BatchChatRequest)
_M = TypeVar("_M", bound=BaseModel)

_LISTS: Final = ("messages", "prompt")
"""Fields that are named as a whole where something in them is wrong."""
COMPLETION_TOKENS: Final = 16
"""Of a completion that does not say how many."""


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate the body of /v1/completions; raises `InvalidRequest` with the field in `param`."""
    request = _parse(CompletionRequest, body)
    if request.best_of is not None and request.best_of < request.n:
        raise InvalidRequest(f"`best_of` must be at least `n` ({request.n}), got {request.best_of}", "best_of")
    if request.stream and (request.best_of or request.n) != request.n:
        raise InvalidRequest("`best_of` other than `n` cannot be streamed", "best_of")
    return request


def parse_chat(body: bytes) -> ChatRequest:
    """Validate the body of /v1/chat/completions; raises `InvalidRequest` with the field in `param`."""
    return _checked(_parse(ChatRequest, body))


def parse_chat_batch(body: bytes) -> BatchChatRequest:
    """The same for /v1/chat/completions/batch."""
    return _checked(_parse(BatchChatRequest, body))


def _checked(request: _C) -> _C:
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
    return request


def to_job(body: Body, tokenizer: Tokenizer, limits: ModelLimits, job_id: str) -> GenerationJob:
    """Turn a validated body into a job: n choices for each prompt, in OpenAI's order.

    Tokenizes on the calling thread. Raises `InvalidRequest` for what needs the tokenizer or the model to be seen.
    """
    sampling = with_bad_words(SamplingParams(**{**tokenizer.sampling_defaults, **_given(body)}), tokenizer)
    n = body.n
    if isinstance(body, CompletionRequest):
        field, prompts = "prompt", _prompts(body, tokenizer)
        n = body.best_of or n
    else:
        field, prompts = "messages", chat_prompts(body, tokenizer)
    report = _report(body, sampling)
    if report.best is not None and sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)  # by which the best are found
    if body.truncate_prompt_tokens is not None:
        prompts = [_truncated(prompt, body.truncate_prompt_tokens, sampling, limits) for prompt in prompts]
    return make_job(job_id, prompts, sampling, limits, prompt_field=field, n=n, stream=body.stream, report=report)


def _report(body: Body, sampling: SamplingParams) -> ReportOptions:
    options = body.stream_options or StreamOptions()
    best = body.n if isinstance(body, CompletionRequest) and (body.best_of or body.n) != body.n else None
    return ReportOptions(
        options.include_usage,
        options.continuous_usage_stats,
        best=best,
        logprobs=sampling.logprobs is not None,
        prompt_logprobs="prompt_logprobs" in (body.model_extra or {}),
        token_ids=body.return_token_ids,
        tokens_as_ids=body.return_tokens_as_token_ids,
    )


def _truncated(prompt: Prompt, most: int, sampling: SamplingParams, limits: ModelLimits) -> Prompt:
    """The end of a prompt, at most so many tokens; -1: what the context leaves beside the tokens asked for."""
    if most == 0:
        raise InvalidRequest("`truncate_prompt_tokens` must be -1 or at least 1, got 0", "truncate_prompt_tokens")
    wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
    most = max(limits.max_model_len - wanted, 1) if most == -1 else most
    return replace(prompt, token_ids=prompt.token_ids[-most:])


def _given(body: Body) -> dict[str, Any]:
    """The sampling parameters of a body, unchecked."""
    given = sampling_given(body.model_extra, SAMPLING)
    if body.stream and "prompt_logprobs" in given:
        raise InvalidRequest("`prompt_logprobs` cannot be streamed", "prompt_logprobs")
    if isinstance(body, CompletionRequest):
        if body.echo and "logprobs" in given:
            given = {"prompt_logprobs": given["logprobs"], **given}
        return {"max_tokens": COMPLETION_TOKENS, **given, "grammar": body.text_grammar()}
    given["logprobs"] = _top_logprobs(body)
    most = given.get("max_tokens") if body.max_completion_tokens is None else body.max_completion_tokens
    if most is not None and isinstance(most, int) and most < 1:
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidRequest(f"`{field}` must be at least 1, got {most}", field)
    return {**given, "max_tokens": most}


def _top_logprobs(body: ChatFields) -> int | None:
    if body.logprobs and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"`top_logprobs` must be between 0 and {MAX_LOGPROBS}", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def validated(kind: type[_M], body: bytes) -> _M:
    """Validate a body against a model; raises `InvalidRequest` with the field in `param`."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        raise _invalid(exc) from None


def _parse(kind: type[_B], body: bytes) -> _B:
    request = validated(kind, body)
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
    if param in UNION_RULES and (first["type"] != "literal_error" or param not in _LISTS):
        return InvalidRequest(f"`{param}` {UNION_RULES[param]}", param)
    path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"]).removeprefix(".")
    return InvalidRequest(f"`{path}`: {first['msg']}", param if param in _LISTS else path)


def _refuse_unsupported(request: Body) -> None:
    extra = request.model_extra or {}
    for name, neutral in UNSUPPORTED.items():
        if name in extra and extra[name] not in neutral:
            raise InvalidRequest(f"`{name}` is not supported", name)
    if isinstance(request, ChatFields):
        for name, harmless in (("echo", False), ("best_of", request.n)):
            if extra.get(name, harmless) != harmless:
                raise InvalidRequest(f"`{name}` is not supported for chat completions", name)


def _prompts(body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    given: Any = body.prompt
    batch = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    return [_prompt(each, body, tokenizer) for each in (given if batch else [given])]


def _prompt(given: str | Sequence[int], body: CompletionRequest, tokenizer: Tokenizer) -> Prompt:
    if isinstance(given, str):
        return Prompt(tokenizer.encode(given, body.add_special_tokens), given if body.echo else None)
    return Prompt(given, tokenizer.decode(given) if body.echo else None)
