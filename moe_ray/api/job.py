"""One request for text, whatever the API that it came by: prompts as token ids, how to sample, what to report."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from moe_ray.core import AdapterRef, Request, SamplingParams
from moe_ray.errors import ContextLengthExceeded, InvalidRequest
from moe_ray.sampling import DRAW_SEED, MAX_SEED, MIN_SEED, Grammar
from moe_ray.text.answers.parts import AnswerReader

MAX_CHOICES: Final = 4096
"""Most sequences one request may start: prompts times choices."""
MAX_ROUTED_POSITIONS: Final = 2**18
"""Whose experts one response may tell: 16 MB of them for Mixtral-8x7B."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model can take."""

    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: Sequence[int]
    echo: str | None = None
    """Text that goes before the output; None: the prompt is not repeated."""
    grammar: Grammar | None = None
    """What the output must match, beside what the request's sampling says of all its prompts."""
    make_reader: Callable[[], AnswerReader] | None = None
    """What takes each of its answers apart; None: an answer is one text."""


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a response tells besides the text."""

    usage: bool = False
    """How many tokens were used, at its end."""
    continuous_usage: bool = False
    """The same so far, with every chunk."""
    best: int | None = None
    """How many of each prompt's choices are told: those whose tokens are likeliest. None: all."""
    logprobs: bool = True
    """Those of the tokens, where the engine was asked for them."""
    prompt_logprobs: bool = False
    """Those of prompt tokens, in a whole response."""
    token_ids: bool = False
    """Of prompt and output."""
    tokens_as_ids: bool = False
    """Tokens of log-probabilities as `token_id:7`, not as text."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a job."""

    request: Request
    prompt_index: int
    echo: str | None = None
    make_reader: Callable[[], AnswerReader] | None = None


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What every API parses its requests into."""

    job_id: str
    choices: tuple[Choice, ...]
    """Those of one prompt side by side, prompts in the order of the request."""
    stream: bool = False
    report: ReportOptions = ReportOptions()

    @property
    def requests(self) -> list[tuple[int, Request]]:
        """(choice index, request) of the choices of which something is asked of the engine."""
        return [(i, each.request) for i, each in enumerate(self.choices) if not each.request.sampling.empty]

    def with_adapter(self, adapter: AdapterRef | None) -> GenerationJob:
        """The same job, its sequences computed with an adapter."""
        if adapter is None:
            return self
        choices = (replace(each, request=each.request.with_adapter(adapter)) for each in self.choices)
        return replace(self, choices=tuple(choices))

    def traced_by(self, traceparent: str) -> GenerationJob:
        """The same job, its requests as parts of a trace."""
        choices = (replace(each, request=replace(each.request, traceparent=traceparent)) for each in self.choices)
        return replace(self, choices=tuple(choices))


def make_job(
    job_id: str,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    limits: ModelLimits,
    *,
    prompt_field: str,
    n: int = 1,
    stream: bool = False,
    report: ReportOptions | None = None,
    seed: int | None = None,
) -> GenerationJob:
    """Check a request against the model, and give each of the `n` choices of a prompt its own request and seed.

    `sampling.max_tokens` None fills the context. `prompt_field` is what the API calls the prompts. `seed`
    goes before that of `sampling`, and any of 64 bits is one, -1 too. Raises `InvalidRequest` naming the field.
    """
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts with n={n} are more than {MAX_CHOICES} choices", prompt_field)
    check_ids(sampling.logit_bias, "logit_bias", limits.vocab_size)
    check_ids(sampling.stop_token_ids, "stop_token_ids", limits.vocab_size)
    check_ids(sampling.allowed_token_ids, "allowed_token_ids", limits.vocab_size)
    for word in sampling.bad_words_ids:
        check_ids(word, "bad_words_ids", limits.vocab_size)
    seed = sampling_seed(sampling) if seed is None else seed
    choices: list[Choice] = []
    for number, prompt in enumerate(prompts):
        if not prompt.token_ids:
            raise InvalidRequest(f"`{prompt_field}` must hold at least one token", prompt_field)
        check_ids(prompt.token_ids, prompt_field, limits.vocab_size)
        token_ids = tuple(prompt.token_ids)
        most = _max_tokens(sampling.max_tokens, len(token_ids), limits.max_model_len, prompt_field)
        for i in range(n):
            own = replace(sampling, max_tokens=most, seed=_wrapped(seed + i))
            if prompt.grammar is not None:
                own = replace(own, grammar=prompt.grammar)
            request = Request(f"{job_id}-{len(choices)}", token_ids, own)
            choices.append(Choice(request, number, prompt.echo, prompt.make_reader))
    if sampling.return_routed_experts:
        _check_routed(choices)
    return GenerationJob(job_id, tuple(choices), stream, report or ReportOptions())


def sampling_seed(sampling: SamplingParams) -> int:
    """The seed that a request gives, or one drawn where it gives none."""
    return secrets.randbits(63) if sampling.seed is None or sampling.seed == DRAW_SEED else sampling.seed


def _wrapped(seed: int) -> int:
    return seed if seed <= MAX_SEED else seed - MAX_SEED + MIN_SEED - 1


def _max_tokens(wanted: int | None, num_prompt: int, max_model_len: int, field: str) -> int:
    if num_prompt + (1 if wanted is None else wanted) <= max_model_len:
        return max_model_len - num_prompt if wanted is None else wanted
    asked = f"you requested {num_prompt + (wanted or 0)} tokens ({num_prompt} in the {field}"
    asked += f", {wanted} in the completion)" if wanted is not None else ")"
    raise ContextLengthExceeded(
        f"This model's maximum context length is {max_model_len} tokens. However, {asked}. "
        f"Please reduce the length of the {field} or completion.",
        field,
    )


def check_ids(ids: Collection[int], field: str, vocab_size: int) -> None:
    """Raise `InvalidRequest` naming the field if an id is outside of the vocabulary."""
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"`{field}` holds token id {wrong}; the vocabulary ends at {vocab_size - 1}", field)


def _check_routed(choices: Sequence[Choice]) -> None:
    """Raise `InvalidRequest` where the experts of more positions are asked for than one response should carry."""
    requests = [choice.request for choice in choices]
    positions = sum(len(each.prompt_token_ids) + (each.sampling.max_tokens or 0) for each in requests)
    if positions > MAX_ROUTED_POSITIONS:
        raise InvalidRequest(
            f"`return_routed_experts` of up to {positions} positions in all choices is too much: at most "
            f"{MAX_ROUTED_POSITIONS}",
            "return_routed_experts",
        )
