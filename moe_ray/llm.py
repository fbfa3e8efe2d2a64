"""Offline generation in this process, without Ray: trunk and experts side by side, the same engine as the server's."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from moe_ray.api.output import ChoiceOutput
from moe_ray.config import load_config
from moe_ray.core import AdapterRef, EngineStats, FinishReason, Request, SamplingParams, TokenLogprobs
from moe_ray.engine.build import build_engine
from moe_ray.errors import ConfigError, InvalidRequest
from moe_ray.experts.local import local_experts
from moe_ray.hub import open_draft, resolve_adapter, resolve_model
from moe_ray.llm_inputs import Prompt, as_params, as_prompts
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.lora.adapter_file import read_adapter
from moe_ray.text.bad_words import with_bad_words
from moe_ray.text.tokenizer import Tokenizer
from moe_ray.text.vocabulary import token_bytes

Message = Mapping[str, Any]


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
    """A model in this process.

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
        hf_overrides: Mapping[str, Any] | str | None = None,
        load_format: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> None:
        """Load `model`: a directory, a Hugging Face repo id, or `demo`.

        `quantize`, `quantize_trunk`: hold the experts', the trunk's matrices in fewer bits: "int8", "int4" or "nf4".
        `kv_cache_dtype`: "auto", "int8" or "fp8": half of bfloat16's memory for the KV cache.
        `draft_model`: a small model that guesses tokens, where that pays (`engine={"speculative": "draft"}`: always).
        `hf_overrides`: other values of keys of the model's config.json, or their JSON.
        `load_format`: "auto", or "dummy": random weights, of which config.json and a tokenizer are enough.
        `adapters`: LoRA adapters in PEFT's format, the name by which `generate` is asked for one to its directory or
        repo id. `options` are further sections of the configuration, e.g. `engine={"max_num_seqs": 8}`. `progress` is
        called with (what, done, total) while things load.
        Raises `CheckpointError`, `ConfigError`, `AdapterError`.
        """
        compute = {"dtype": dtype, "device": device, "kernels": kernels}
        # Experts in this process compute when they are asked: no micro-batch has anything to wait for.
        drafts = {} if draft_model is None else {"draft_model": str(draft_model), "speculative": "auto"}
        engine = {"micro_batches": 1, "kv_cache_dtype": kv_cache_dtype, **drafts, **options.pop("engine", {})}
        named = {"path": str(model), "load_format": load_format, "hf_overrides": hf_overrides}
        model_options = {**named, "max_model_len": max_model_len, **compute}
        sections = {
            "experts": {"quantize": quantize, **options.pop("experts", {})},
            "trunk": {"quantize": quantize_trunk, **options.pop("trunk", {})},
        }
        self.config = load_config({**options, **sections, "engine": engine, "model": model_options})
        if self.config.variants:
            raise ConfigError(
                "`variants`: several models share experts in a server (moe-ray serve), not in one process"
            )
        directory = resolve_model(self.config, progress)
        self.tokenizer = Tokenizer(directory)
        checkpoint, draft = Checkpoint.open(directory), open_draft(self.config, directory, progress)
        self._model = checkpoint.config
        self._adapters: dict[str, AdapterRef] = {}
        for name, source in {**self.config.adapters.modules, **(adapters or {})}.items():
            self.add_adapter(name, source)

        def watch(what: str) -> Callable[[int, int], None] | None:
            return None if progress is None else lambda done, total: progress(what, done, total)

        self._engine = build_engine(
            self.config,
            checkpoint,
            lambda compute: local_experts(
                checkpoint,
                compute,
                lambda e: watch(f"Expert{e}") or _ignore,
                self.config.experts.quantize_of,
                resolve_adapter,
                self.config.experts.offload_bytes_of,
            ),
            watch("Trunk"),
            lambda: token_bytes(self.tokenizer),
            draft,
            resolve_adapter,
        )
        checkpoint.close()
        self._ids = itertools.count()

    def add_adapter(self, name: str, source: str | Path) -> None:
        """Have a LoRA adapter under a name, in the place of one that has it. Raises `AdapterError`."""
        adapter = read_adapter(resolve_adapter(str(source)), self._model)
        self._adapters[name] = AdapterRef(adapter.adapter_id, str(source))

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
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete any number of prompts in one continuous batch; outputs in the order of the prompts.

        One prompt may stand without a list, one `SamplingParams` for all prompts, one name of an adapter, too; None is
        the model itself. `on_step` is called with (finished,
        total) whenever a prompt is finished. Raises `InvalidRequest` before anything runs, and whatever error ended a
        sequence.
        """
        choices = self._choices(as_prompts(prompts), sampling_params, adapter)
        finished = 0
        for index, _ in self._run(choices):
            if choices[index].finish_reason is not None:
                finished += 1
                if on_step is not None:
                    on_step(finished, len(choices))
        return [_output(choice) for choice in choices]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation (a list of messages), or each of a list of conversations, by the chat template."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        prompts = [self.tokenizer.apply_chat_template(list(conversation)) for conversation in conversations]
        outputs = self.generate(prompts, sampling_params, adapter=adapter)
        return outputs[0] if one else outputs

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[str]:
        """Complete one prompt, yielding text as it comes."""
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise InvalidRequest(f"`prompt` must be one prompt, got {len(prompts)}", "prompt")
        for _, delta in self._run(self._choices(prompts, sampling_params, adapter)):
            if delta:
                yield delta

    def _choices(
        self,
        prompts: Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
    ) -> list[ChoiceOutput]:
        choices = []
        params_of_each, adapters = as_params(sampling_params, len(prompts)), self._as_adapters(adapter, len(prompts))
        for prompt, params, each in zip(prompts, params_of_each, adapters, strict=True):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            request = Request(f"llm-{next(self._ids)}", tuple(ids), with_bad_words(params, self.tokenizer))
            if each is not None:
                request = request.with_adapter(each)
            if not params.empty:
                self._engine.check(request)
            choices.append(ChoiceOutput(self.tokenizer, request))
        return choices

    def _as_adapters(self, given: str | Sequence[str | None] | None, count: int) -> list[AdapterRef | None]:
        """The adapter of each prompt. Raises `InvalidRequest` for a name that is not there."""
        names = [given] * count if given is None or isinstance(given, str) else list(given)
        if len(names) != count:
            raise InvalidRequest(f"{len(names)} names of adapters for {count} prompts", "adapter")
        for name in names:
            if name is not None and name not in self._adapters:
                known = ", ".join(map(repr, self._adapters)) or "none"
                raise InvalidRequest(f"there is no adapter {name!r}; there are: {known}", "adapter")
        return [None if name is None else self._adapters[name] for name in names]

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


def _ignore(done: int, total: int) -> None:
    """Progress that is not shown."""
