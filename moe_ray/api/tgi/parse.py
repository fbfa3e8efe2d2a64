"""From the body of a request to TGI's API to a `GenerationJob`. Refusals have TGI's messages: clients match them."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from moe_ray.api.job import GenerationJob, ModelLimits, Prompt, make_job
from moe_ray.api.tgi.constraint import grammar_of
from moe_ray.api.tgi.limits import TgiLimits
from moe_ray.api.tgi.schemas import TgiGenerateBody, TgiParameters
from moe_ray.core import SamplingParams
from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import Tokenizer

_B = TypeVar("_B", bound=BaseModel)

WITHOUT_PARAMETERS: Final = TgiParameters(do_sample=True)
"""What holds for a request that leaves `parameters` out."""


def read(kind: type[_B], raw: bytes) -> _B:
    """Validate the JSON of a body; raises `InvalidRequest` with the field in `param`."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _invalid(error) from None


def parameters_of(body: TgiGenerateBody) -> TgiParameters:
    """The parameters of a request, or those that hold where it has none."""
    return WITHOUT_PARAMETERS if body.parameters is None else body.parameters


def is_sampled(given: TgiParameters) -> bool:
    """Whether tokens are drawn; else each is the most likely one. A temperature of 1 asks for nothing."""
    asked = (given.top_k, given.top_p, given.typical_p)
    return bool(given.do_sample) or given.temperature not in (None, 1.0) or any(each is not None for each in asked)


def to_job(
    body: TgiGenerateBody,
    tokenizer: Tokenizer,
    model: ModelLimits,
    limits: TgiLimits,
    job_id: str,
    *,
    stream: bool = False,
) -> GenerationJob:
    """Check a request by TGI's rules and turn it into a job of one choice, or of `best_of`.

    Tokenizes on the calling thread. Raises `InvalidRequest` naming the field.
    """
    given = parameters_of(body)
    best_of = 1 if given.best_of is None else given.best_of
    _check_stream(given, best_of, stream)
    _check_best_of(given, best_of, limits)
    _check_numbers(given)
    _check_amounts(given, limits)
    _refuse_unsupported(given, limits)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty", "inputs")
    token_ids = tokenizer.encode(body.inputs)
    most_input = model.max_model_len - 1 if limits.max_input_tokens is None else limits.max_input_tokens
    if given.truncate is not None:
        if not 1 <= given.truncate <= most_input:
            raise InvalidRequest(
                f"`truncate` must be strictly positive and less than {most_input}. Given: {given.truncate}", "truncate"
            )
        token_ids = token_ids[-given.truncate :]
    sampling = replace(
        _sampling(given, stream),
        max_tokens=_max_new_tokens(len(token_ids), given.max_new_tokens, model.max_model_len, most_input),
    )
    seed = None if given.seed is None else _signed(given.seed)
    return make_job(
        job_id, [Prompt(token_ids)], sampling, model, prompt_field="inputs", n=best_of, stream=stream, seed=seed
    )


def _sampling(given: TgiParameters, stream: bool) -> SamplingParams:
    sampled = is_sampled(given)
    temperature = 1.0 if given.temperature is None else given.temperature
    tells_tokens = stream or given.details or given.decoder_input_details or (given.best_of or 1) > 1
    return SamplingParams(
        max_tokens=None,
        temperature=temperature if sampled else 0.0,
        top_k=given.top_k or 0,
        top_p=1.0 if given.top_p is None else given.top_p,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        frequency_penalty=given.frequency_penalty or 0.0,
        stop=tuple(given.stop or ()),
        logprobs=(given.top_n_tokens or 0) if tells_tokens else None,
        prompt_logprobs=0 if given.decoder_input_details else None,
        grammar=None if given.grammar is None else grammar_of(given.grammar),
    )


def _check_stream(given: TgiParameters, best_of: int, stream: bool) -> None:
    if stream and best_of != 1:
        raise InvalidRequest("`best_of` != 1 is not supported when streaming tokens", "best_of")
    if stream and given.decoder_input_details:
        raise InvalidRequest(
            "`decoder_input_details` == true is not supported when streaming tokens", "decoder_input_details"
        )


def _check_best_of(given: TgiParameters, best_of: int, limits: TgiLimits) -> None:
    if not 1 <= best_of <= limits.max_best_of:
        raise InvalidRequest(f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}", "best_of")
    if best_of > 1 and not is_sampled(given):
        raise InvalidRequest("you must use sampling when `best_of` is > 1", "best_of")
    if best_of > 1 and given.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1", "seed")


def _check_numbers(given: TgiParameters) -> None:
    for name in ("temperature", "repetition_penalty", "top_k"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise InvalidRequest(f"`{name}` must be strictly positive", name)
    for name in ("top_p", "typical_p"):
        value = getattr(given, name)
        if value is not None and not 0.0 < value < 1.0:
            raise InvalidRequest(f"`{name}` must be > 0.0 and < 1.0", name)
    if given.frequency_penalty is not None and not -2.0 <= given.frequency_penalty <= 2.0:
        raise InvalidRequest("`frequency_penalty` must be >= -2.0 and <= 2.0", "frequency_penalty")


def _check_amounts(given: TgiParameters, limits: TgiLimits) -> None:
    if given.max_new_tokens == 0:
        raise InvalidRequest("`max_new_tokens` must be strictly positive", "max_new_tokens")
    if (count := len(given.stop or ())) > limits.max_stop_sequences:
        raise InvalidRequest(
            f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {count}", "stop"
        )
    if given.top_n_tokens is not None and given.top_n_tokens > limits.max_top_n_tokens:
        raise InvalidRequest(
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {given.top_n_tokens}",
            "top_n_tokens",
        )


def _refuse_unsupported(given: TgiParameters, limits: TgiLimits) -> None:
    if given.watermark:
        raise InvalidRequest("`watermark` is not supported", "watermark")
    if given.grammar is not None and not limits.grammars:
        raise InvalidRequest("grammar is not supported", "grammar")


def _max_new_tokens(num_input: int, wanted: int | None, most: int, most_input: int) -> int:
    """How many tokens to generate; all that fit where none are asked for."""
    new = max(most - num_input, 0) if wanted is None else wanted
    if num_input + new > most:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {most}. Given: {num_input} `inputs` tokens and {new} "
            "`max_new_tokens`",
            "inputs",
        )
    if num_input > most_input:
        raise InvalidRequest(f"`inputs` must have less than {most_input} tokens. Given: {num_input}", "inputs")
    return new


def _signed(seed: int) -> int:
    """A seed of 64 bits as the engine takes it, by its two's complement: no two seeds become one."""
    return seed - 2**64 if seed >= 2**63 else seed


def unsigned(seed: int) -> int:
    """The inverse of `_signed`: how a response tells a seed.

    >>> unsigned(_signed(2**64 - 1)) == 2**64 - 1
    True
    """
    return seed % 2**64


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(each) for each in first["loc"]]
    if not where:
        return InvalidRequest(f"the body is not a valid JSON object: {first['msg']}")
    # A parameter is called by its own name, as in TGI's messages.
    name = ".".join(where[1:] if where[0] == "parameters" and len(where) > 1 else where)
    if first["type"] == "missing":
        return InvalidRequest(f"`{name}` is required", name)
    if first["type"] != "extra_forbidden":
        return InvalidRequest(f"`{name}`: {first['msg']}", name)
    known = list(TgiParameters.model_fields if where[0] == "parameters" else TgiGenerateBody.model_fields)
    nearest = difflib.get_close_matches(where[-1], known, 1)
    hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
    return InvalidRequest(f"`{name}` is not supported{hint}", name)
