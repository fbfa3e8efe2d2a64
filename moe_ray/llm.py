"""Offline generation in this process, without Ray: trunk and experts side by side, the same engine as the server's."""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, overload

import numpy as np

from moe_ray.api.job import sampling_seed
from moe_ray.api.output import ChoiceOutput
from moe_ray.config import load_config
from moe_ray.core import EngineStats, FinishReason, Request, SamplingParams, TokenLogprobs
from moe_ray.engine.build import build_engine
from moe_ray.errors import InvalidRequest
from moe_ray.experts.local import local_experts
from moe_ray.hub import open_draft, resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.text.bad_words import with_bad_words
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.vocabulary import token_bytes

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or one of them in vLLM's dictionaries: {"prompt": …}, {"prompt_token_ids": …}."""
Message = Mapping[str, Any]
_PROMPT_KEYS: Final = ("prompt_token_ids", "prompt")
"""Of a prompt's dictionary; the first that is there counts, as for vLLM."""


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """With `prompt_logprobs`: of each prompt token; the first has none."""
    num_cached_tokens: int = 0
    routed_experts: np.ndarray | None = None
    """With `return_routed_experts`: the experts of each computed token of prompt and output, ascending.

    [len(prompt_token_ids) + len(token_ids) - 1, num_hidden_layers, num_experts_per_tok]: nothing is computed of the
    last token. uint8, or uint16 for models of more than 256 experts.
    """


class LLM:
    """A Mixtral-format model in this process.

    >>> llm = LLM("demo")
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))[0].text
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str | None = None,
        device: str | None = None,
        kernels: str | None = None,
        quantize: str | None = None,
        quantize_trunk: str | None = None,
        kv_cache_dtype: str | None = None,
        draft_model: str | Path | None = None,
        max_model_len: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> None:
        """Load `model`: a directory, a Hugging Face repo id, or `demo`.

        `quantize`, `quantize_trunk`: hold the experts', the trunk's matrices in fewer bits: "int8", "int4" or "nf4".
        `kv_cache_dtype`: "auto", or "int8": half of bfloat16's memory for the KV cache.
        `draft_model`: a small model that guesses tokens, where that pays (`engine={"speculative": "draft"}`: always).
        `options` are further sections of the configuration, e.g. `engine={"max_num_seqs": 8}`. `progress` is called
        with (what, done, total) while things load. Raises `CheckpointError`, `ConfigError`.
        """
        compute = {"dtype": dtype, "device": device, "kernels": kernels}
        # Experts in this process compute when they are asked: no micro-batch has anything to wait for.
        drafts = {} if draft_model is None else {"draft_model": str(draft_model), "speculative": "auto"}
        engine = {"micro_batches": 1, "kv_cache_dtype": kv_cache_dtype, **drafts, **options.pop("engine", {})}
        model_options = {"path": str(model), "max_model_len": max_model_len, **compute}
        sections = {
            "experts": {"quantize": quantize, **options.pop("experts", {})},
            "trunk": {"quantize": quantize_trunk, **options.pop("trunk", {})},
        }
        self.config = load_config({**options, **sections, "engine": engine, "model": model_options})
        quantize_of = self.config.experts.quantize_of
        directory = resolve_model(self.config, progress)
        self.tokenizer = Tokenizer(directory)
        checkpoint, draft = Checkpoint.open(directory), open_draft(self.config, directory, progress)

        def watch(what: str) -> Callable[[int, int], None] | None:
            return None if progress is None else lambda done, total: progress(what, done, total)

        self._engine = build_engine(
            self.config,
            checkpoint,
            lambda compute: local_experts(checkpoint, compute, lambda e: watch(f"Expert{e}") or _ignore, quantize_of),
            watch("Trunk"),
            lambda: token_bytes(self.tokenizer),
            draft,
        )
        checkpoint.close()
        self._ids = itertools.count()

    @property
    def max_model_len(self) -> int:
        return self._engine.options.max_model_len

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete any number of prompts in one continuous batch; outputs in the order of the prompts.

        One prompt may stand without a list, one `SamplingParams` for all prompts. `on_step` is called with (finished,
        total) whenever a prompt is finished. Raises `InvalidRequest` before anything runs, and whatever error ended a
        sequence.
        """
        choices = self._choices(_as_prompts(prompts), sampling_params)
        finished = 0
        for index, _ in self._run(choices):
            if choices[index].finish_reason is not None:
                finished += 1
                if on_step is not None:
                    on_step(finished, len(choices))
        return [_output(choice) for choice in choices]

    @overload
    def chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation (a list of messages), or each of a list of conversations, by the chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [self.tokenizer.apply_chat_template(list(conversation)) for conversation in conversations]
        outputs = self.generate(prompts, sampling_params)
        return outputs[0] if one else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt, yielding text as it comes."""
        prompts = _as_prompts(prompt)
        if len(prompts) != 1:
            raise InvalidRequest(f"`prompt` must be one prompt, got {len(prompts)}", "prompt")
        for _, delta in self._run(self._choices(prompts, sampling_params)):
            if delta:
                yield delta

    def _choices(
        self, prompts: Sequence[str | list[int]], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[ChoiceOutput]:
        choices = []
        for prompt, params in zip(prompts, _as_params(sampling_params, len(prompts)), strict=True):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            request = Request(f"llm-{next(self._ids)}", tuple(ids), with_bad_words(params, self.tokenizer))
            if not params.empty:
                self._engine.check(request)
            choices.append(ChoiceOutput(self.tokenizer, request))
        return choices

    def _run(self, choices: Sequence[ChoiceOutput]) -> Iterator[tuple[int, str]]:
        """Generate until every choice is finished; yield (index, text that is certain now) for each of their steps."""
        waiting = deque(enumerate(choices))
        index_of: dict[str, int] = {}
        try:
            while waiting or index_of:
                while waiting and self._engine.overload() is None:
                    index, choice = waiting.popleft()
                    if choice.request.sampling.empty:
                        yield index, choice.finish_empty().text
                        continue
                    self._engine.submit(choice.request)
                    index_of[choice.request.request_id] = index
                self._engine.wait()
                for event in self._engine.step():
                    index = index_of[event.request_id]
                    delta = choices[index].take(event)
                    if delta.finish_reason is not None:
                        del index_of[event.request_id]
                        self._engine.abort(event.request_id)  # a stop string: the engine would go on
                    yield index, delta.text
        finally:
            for request_id in index_of:
                self._engine.abort(request_id)


def _output(choice: ChoiceOutput) -> RequestOutput:
    return RequestOutput(
        prompt_token_ids=list(choice.request.prompt_token_ids),
        text="".join(choice.text),
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        logprobs=choice.logprobs,
        prompt_logprobs=choice.prompt_logprobs,
        num_cached_tokens=choice.num_cached,
        routed_experts=choice.routed_experts() if choice.request.sampling.return_routed_experts else None,
    )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """The prompts as texts or token ids. Raises `InvalidRequest` for anything that is neither."""
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_as_prompt(prompts)]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise _no_prompt(prompts)
    return [_as_prompt(prompt) for prompt in prompts]


def _as_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in prompt.items() if value is not None}
        if unknown := sorted(map(str, given.keys() - set(_PROMPT_KEYS))):
            raise InvalidRequest(f"a prompt's `{unknown[0]}` is not supported", unknown[0])
        for key in _PROMPT_KEYS:
            if key in given and isinstance(given[key], str) == (key == "prompt"):
                return _as_prompt(given[key])
        raise _no_prompt(prompt)
    if not _is_ids(prompt):
        raise _no_prompt(prompt)
    return [operator.index(token_id) for token_id in prompt]


def _is_ids(prompt: Any) -> bool:
    """A list, tuple or array of whole numbers, not empty."""
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, str | bytes) or len(prompt) == 0:
        return False
    return all(type(each) is int or _is_scalar(each) for each in prompt)


def _is_scalar(value: Any) -> bool:
    """A whole number of numpy or torch; arrays are not, though they may have the method, too."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _no_prompt(given: object) -> InvalidRequest:
    shown = repr(given)[:80]
    return InvalidRequest(
        f'a prompt is a text, a list of token ids, {{"prompt": …}} or {{"prompt_token_ids": …}}, got {shown}', "prompt"
    )


def _as_params(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt, all with a seed of their own. Raises `InvalidRequest` where they do not fit the prompts."""
    if given is None or isinstance(given, SamplingParams):
        params = [given or SamplingParams()] * count
    else:
        params = list(given)
    if not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequest("`sampling_params` must be a SamplingParams or a list of them", "sampling_params")
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling parameters for {count} prompts", "sampling_params")
    return [replace(each, seed=sampling_seed(each)) for each in params]


def _ignore(done: int, total: int) -> None:
    """Progress that is not shown."""
