"""From the body of a request to ollama's API to a `GenerationJob`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from moe_ray.api.chat import ChatInput, Tool, chat_prompt
from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, make_job
from moe_ray.api.ollama.history import going_on, template_messages
from moe_ray.api.ollama.schemas import (
    HARMLESS_OPTIONS,
    NEUTRAL_OPTIONS,
    OllamaChat,
    OllamaGenerate,
    OllamaOptions,
    OllamaRequest,
    OllamaTool,
)
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.sampling import MAX_LOGPROBS, Grammar
from moe_ray.text.answers.parts import PlainReader
from moe_ray.text.tokenizer import Tokenizer

_B = TypeVar("_B", bound=BaseModel)
_R = TypeVar("_R", bound=OllamaRequest)

_SAME: Final = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
)
"""Options that `SamplingParams` has by the same name."""
_UNSUPPORTED: Final = {
    "images": "images are not supported",
    "suffix": "a suffix is not supported",
    "template": "another template is not supported; with `raw` the prompt is the whole text",
}


def parse_generate(body: bytes) -> OllamaGenerate:
    """Validate the body of /api/generate. Raises `InvalidRequest` naming the field."""
    request = _checked(parse_body(OllamaGenerate, body))
    if request.raw and (request.system or request.context):
        raise InvalidRequest("raw: the prompt is the whole text then; `system` and `context` do not go with it", "raw")
    return request


def parse_chat(body: bytes) -> OllamaChat:
    """Validate the body of /api/chat. Raises `InvalidRequest` naming the field."""
    return _checked(parse_body(OllamaChat, body))


def parse_body(kind: type[_B], body: bytes) -> _B:
    """Validate a body of any route. Raises `InvalidRequest` naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        raise InvalidRequest(f"the body is not a valid JSON object: {first['msg']}")
    where = ".".join(map(str, first["loc"]))
    wrong = next((said for field, said in _UNSUPPORTED.items() if field in first["loc"]), first["msg"])
    if first["type"] == "extra_forbidden":
        wrong = "this field is not supported"
    raise InvalidRequest(f"{where}: {wrong}", str(first["loc"][0]))


def plain_name(name: str) -> str:
    """A model's name without the tag that all names have where none is given."""
    return name.removesuffix(":latest")


def loads_only(body: OllamaGenerate | OllamaChat) -> bool:
    """Whether a request asks for the model to be loaded, and for nothing else. Raises `InvalidRequest`: unload it."""
    asked = body.prompt if isinstance(body, OllamaGenerate) else body.messages
    if not asked and body.keep_alive in (0, "0", "0s", "0m"):
        raise InvalidRequest("keep_alive: this server does not unload its model", "keep_alive")
    return not asked


def to_job(body: OllamaGenerate | OllamaChat, tokenizer: Tokenizer, limits: ModelLimits, job_id: str) -> GenerationJob:
    """Turn a validated body into a job of one choice. Tokenizes on the calling thread. Raises `InvalidRequest`."""
    generate = isinstance(body, OllamaGenerate)
    prompt = _generate_prompt(body, tokenizer) if isinstance(body, OllamaGenerate) else _chat_prompt(body, tokenizer)
    return make_job(
        job_id,
        [prompt],
        SamplingParams(**{**tokenizer.sampling_defaults, **_sampling(body)}),
        _within(limits, body.options.num_ctx),
        prompt_field="prompt" if generate else "messages",
        stream=body.stream,
    )


def _generate_prompt(body: OllamaGenerate, tokenizer: Tokenizer) -> Prompt:
    grammar = _grammar(body)
    if body.context:
        ids = going_on(body.context, body.prompt, body.system, tokenizer)
        return Prompt(ids, grammar=grammar, make_reader=PlainReader)
    if body.raw or not tokenizer.chat_template.exists:
        if body.system:
            raise InvalidRequest("system: this model has no chat template that would place it", "system")
        return Prompt(tokenizer.encode(body.prompt), grammar=grammar, make_reader=PlainReader)
    system = [{"role": "system", "content": body.system}] if body.system else []
    return chat_prompt(ChatInput([*system, {"role": "user", "content": body.prompt}], grammar=grammar), tokenizer)


def _chat_prompt(body: OllamaChat, tokenizer: Tokenizer) -> Prompt:
    messages = template_messages(body.messages)
    prefilled = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    if prefilled and not messages[-1]["content"]:
        raise InvalidRequest(
            "messages: the last turn is the assistant's and would be continued, but is empty", "messages"
        )
    chat = ChatInput(
        messages,
        tools=tuple(map(_tool, body.tools)),
        grammar=_grammar(body),
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
    )
    return chat_prompt(chat, tokenizer)


def _tool(tool: OllamaTool) -> Tool:
    function = tool.function
    if function.parameters is None:
        return Tool(function.name, function.description or "")
    return Tool(function.name, function.description or "", function.parameters)


def _grammar(body: OllamaRequest) -> Grammar | None:
    if body.form == "json":
        return Grammar("json_object")
    return Grammar("json_schema", json.dumps(body.form)) if body.form else None


def _sampling(body: OllamaRequest) -> dict[str, Any]:
    options = body.options
    given = {name: value for name in _SAME if (value := getattr(options, name)) is not None}
    if options.repeat_penalty is not None and options.repeat_last_n != 0:
        given["repetition_penalty"] = options.repeat_penalty
    most = options.num_predict
    given["max_tokens"] = None if most is None or most in (-1, -2) else most
    given["logprobs"] = body.top_logprobs if body.logprobs else None
    return given


def _within(limits: ModelLimits, num_ctx: int | None) -> ModelLimits:
    if num_ctx is None:
        return limits
    if num_ctx > limits.max_model_len:
        raise InvalidRequest(
            f"options.num_ctx: {num_ctx} tokens are more than this server takes ({limits.max_model_len})", "options"
        )
    return replace(limits, max_model_len=num_ctx)


def _checked(body: _R) -> _R:
    """Refuse what ollama knows and this server does not."""
    if body.think:
        raise InvalidRequest(f"think: {body.model!r} does not support thinking", "think")
    if body.logprobs and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"top_logprobs: must be between 0 and {MAX_LOGPROBS}", "top_logprobs")
    _check_options(body.options)
    return body


def _check_options(options: OllamaOptions) -> None:
    for name, value in (options.model_extra or {}).items():
        if name in HARMLESS_OPTIONS or value is None or value in NEUTRAL_OPTIONS.get(name, ()):
            continue
        if name in NEUTRAL_OPTIONS:
            raise InvalidRequest(f"options.{name}: {value!r} is not supported", "options")
        raise InvalidRequest(f"options.{name}: there is no such option", "options")
    if options.num_predict is not None and options.num_predict < 1 and options.num_predict not in (-1, -2):
        raise InvalidRequest("options.num_predict: must be -1, -2 or at least 1", "options")
    if options.repeat_penalty not in (None, 1.0) and options.repeat_last_n not in (None, -1, 0):
        raise InvalidRequest("options.repeat_last_n: must be -1, for all tokens, or 0", "options")
