"""OpenAI's completions and chat completions: schemas, validation, and conversion to `core.Request`. No ray, no network.

The responses are built in `openai_stream.py`, those that tell of an error in `openai_errors.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from moe_ray.core import MAX_SEED, Request, SamplingParams
from moe_ray.errors import InvalidRequest, ModelNotFound
from moe_ray.text.tokenizer import Tokenizer

MAX_CHOICES = 128
MAX_ROUTED_POSITIONS = 2**18
"""Whose experts one response may tell: 16 MB of them for Mixtral-8x7B."""
"""Most sequences one HTTP request may start: prompts times n."""


class StreamOptions(BaseModel):
    """What a stream carries beside the tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """The fields both endpoints share. Unknown fields are kept to be checked by `_refuse_unsupported`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[StrictInt, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    # taken over by SamplingParams as they are, where given; else the checkpoint's generation_config.json counts (as
    # for vLLM), then SamplingParams' defaults: these here are never read
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_routed_experts: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    add_special_tokens: bool = True
    echo: bool = False
    logprobs: int | None = None
    max_tokens: int | None = 16


class ContentPart(BaseModel):
    """One part of a message's content; parts other than text are refused by the tokenizer, by name."""

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a conversation. Further keys (`name`, ...) are passed to the template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    logprobs: bool = False
    max_completion_tokens: int | None = None
    top_logprobs: int = 0


Body = CompletionRequest | ChatRequest
_B = TypeVar("_B", CompletionRequest, ChatRequest)

# Field → the values with which it asks for nothing. Any other value would change the answer, so it is refused.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

_TAKEN_OVER = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "return_routed_experts",
)

# pydantic reports one error for each member of a union; these say it once
_UNION_RULES = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": "must be a string or a list of strings",
    "messages": "must be a list of {role, content}, where content is a string or a list of {type: text, text}",
}


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate the body of /v1/completions; raises `InvalidRequest` with the field in `param`."""
    request = _parse(CompletionRequest, body)
    if request.echo and request.logprobs is not None:
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


def check_model(requested: str | None, served: Collection[str]) -> None:
    """Raise `ModelNotFound` unless the request names a served model, or none."""
    if requested is not None and requested not in served:
        raise ModelNotFound(f"The model `{requested}` does not exist.")


def to_requests(body: Body, tokenizer: Tokenizer, max_model_len: int, request_id: str) -> list[tuple[int, Request]]:
    """Turn a validated body into (choice index, request) pairs: n of them for each prompt, in OpenAI's order.

    Tokenizes on the calling thread. Raises `InvalidRequest` for what needs the tokenizer or the model to be seen.
    """
    field = "messages" if isinstance(body, ChatRequest) else "prompt"
    prompts = _prompts(body, tokenizer)
    if len(prompts) * body.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts with n={body.n} are more than {MAX_CHOICES} choices", field)
    _check_ids(body.logit_bias, "logit_bias", tokenizer.vocab_size)
    _check_ids(body.stop_token_ids, "stop_token_ids", tokenizer.vocab_size)
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
    requests: list[tuple[int, Request]] = []
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest(f"`{field}` must hold at least one token", field)
        _check_ids(prompt, field, tokenizer.vocab_size)
        limit = _max_tokens(body, len(prompt), max_model_len, field)
        for i in range(body.n):
            index = len(requests)
            own_seed = seed + i if seed + i <= MAX_SEED else seed + i - MAX_SEED - 1
            params = _sampling(body, limit, own_seed, tokenizer.sampling_defaults)
            requests.append((index, Request(f"{request_id}-{index}", tuple(prompt), params)))
    _check_routed(body, requests, max_model_len)
    return requests


def _check_routed(body: Body, requests: Sequence[tuple[int, Request]], max_model_len: int) -> None:
    """Raise `InvalidRequest` where the experts of more positions are asked for than one response should carry."""
    if not body.return_routed_experts:
        return
    lengths = [(len(r.prompt_token_ids), r.sampling.max_tokens or max_model_len) for _, r in requests]
    positions = sum(min(prompt + output, max_model_len) for prompt, output in lengths)
    if positions > MAX_ROUTED_POSITIONS:
        raise InvalidRequest(
            f"`return_routed_experts` of up to {positions} positions in all choices is too much: at most "
            f"{MAX_ROUTED_POSITIONS}",
            "return_routed_experts",
        )


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
    if param in _UNION_RULES and first["type"] != "literal_error":
        return InvalidRequest(f"`{param}` {_UNION_RULES[param]}", param)
    return InvalidRequest(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}", param)


def _refuse_unsupported(request: Body) -> None:
    extra = request.model_extra or {}
    if extra.get("tool_choice") == "none":  # the model is told not to use them
        extra = {k: v for k, v in extra.items() if k != "tools"}
    if extra.get("function_call") == "none":
        extra = {k: v for k, v in extra.items() if k != "functions"}
    for name, neutral in _UNSUPPORTED.items():
        if name in extra and extra[name] not in neutral:
            raise InvalidRequest(f"`{name}` is not supported", name)
    if extra.get("best_of", request.n) != request.n:
        raise InvalidRequest("`best_of` other than `n` is not supported", "best_of")
    if isinstance(request, ChatRequest) and extra.get("echo"):
        raise InvalidRequest("`echo` is not supported for chat completions", "echo")


def _prompts(body: Body, tokenizer: Tokenizer) -> list[Sequence[int]]:
    if isinstance(body, ChatRequest):
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        for message in messages:
            if message["role"] == "developer":  # OpenAI's newer name for system, unknown to templates
                message["role"] = "system"
        ids = tokenizer.apply_chat_template(
            messages,
            body.add_generation_prompt,
            add_special_tokens=body.add_special_tokens,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        return [ids]
    prompt: Any = body.prompt
    batch = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = prompt if batch else [prompt]
    return [tokenizer.encode(p, body.add_special_tokens) if isinstance(p, str) else p for p in prompts]


def _max_tokens(body: Body, num_prompt: int, max_model_len: int, field: str) -> int:
    """Tokens to generate; None in the request fills the context."""
    wanted = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if num_prompt + (1 if wanted is None else wanted) <= max_model_len:
        return max_model_len - num_prompt if wanted is None else wanted
    asked = f"you requested {num_prompt + (wanted or 0)} tokens ({num_prompt} in the {field}"
    asked += f", {wanted} in the completion)" if wanted is not None else ")"
    raise InvalidRequest(
        f"This model's maximum context length is {max_model_len} tokens. However, {asked}. "
        f"Please reduce the length of the {field} or completion.",
        field,
    )


def _sampling(body: Body, max_tokens: int, seed: int, defaults: Mapping[str, float]) -> SamplingParams:
    logprobs = body.logprobs if isinstance(body, CompletionRequest) else (body.top_logprobs if body.logprobs else None)
    taken: dict[str, Any] = {name: getattr(body, name) for name in _TAKEN_OVER if name in body.model_fields_set}
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        stop=(body.stop,) if isinstance(body.stop, str) else body.stop,
        stop_token_ids=body.stop_token_ids,
        logprobs=logprobs,
        **{**defaults, **taken},
    )


def _check_ids(ids: Collection[int], field: str, vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"`{field}` holds token id {wrong}; the vocabulary ends at {vocab_size - 1}", field)
