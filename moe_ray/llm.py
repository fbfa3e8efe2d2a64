"""Offline generation in this process, without Ray: trunk and experts side by side, the same engine as the server's."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_ray.config import load_config
from moe_ray.core import EngineStats, FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from moe_ray.engine.build import build_engine
from moe_ray.engine.routed_experts import RoutedRows
from moe_ray.experts.local import local_pool
from moe_ray.hub import resolve_model
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
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
        max_model_len: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: Any,
    ) -> None:
        """Load `model`: a directory, a Hugging Face repo id, or `demo`.

        `options` are further sections of the configuration, e.g. `engine={"max_num_seqs": 8}`. `progress` is called
        with (what, done, total) while things load. Raises `CheckpointError`, `ConfigError`.
        """
        numerics = {"dtype": dtype, "device": device, "kernels": kernels}
        # Experts in this process compute when they are asked: no micro-batch has anything to wait for.
        engine = {"micro_batches": 1, **options.pop("engine", {})}
        model_options = {"path": str(model), "max_model_len": max_model_len, **numerics}
        self.config = load_config({**options, "engine": engine, "model": model_options})
        directory = resolve_model(self.config, progress)
        self.tokenizer = Tokenizer(directory)
        checkpoint = Checkpoint.open(directory)

        def watch(what: str) -> Callable[[int, int], None] | None:
            return None if progress is None else lambda done, total: progress(what, done, total)

        self._engine = build_engine(
            self.config,
            checkpoint,
            lambda how: local_pool(checkpoint, how, lambda expert: watch(f"Expert{expert}") or _ignore),
            watch("Trunk"),
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
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or token ids), all in one continuous batch; outputs in the order of the prompts.

        `on_step` is called with (finished, total) after each step. Raises `InvalidRequest` before anything runs, and
        whatever error ended a sequence.
        """
        many = _as_prompts(prompts)
        params = _as_params(sampling, len(many))
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in many]
        outputs = [RequestOutput(prompt) for prompt in ids]
        routed = [RoutedRows() if each.return_routed_experts else None for each in params]
        finished = 0
        for index, event, delta in self._run(ids, params):
            output = outputs[index]
            output.text += delta
            output.token_ids += event.token_ids
            output.logprobs += event.logprobs
            output.num_cached_tokens = event.num_cached_tokens
            output.finish_reason = event.finish_reason
            known = routed[index]
            if known is not None and event.routed_experts is not None:
                known.take(event.routed_experts)
            if known is not None and event.finish_reason is not None:
                output.routed_experts = known.rows(0, len(output.prompt_token_ids) + len(output.token_ids) - 1)
            if event.finish_reason is not None:
                finished += 1
                if on_step is not None:
                    on_step(finished, len(outputs))
        return outputs

    def chat(self, messages: Sequence[Message], sampling: SamplingParams | None = None) -> RequestOutput:
        """Answer one conversation through the model's chat template."""
        return self.generate([self.tokenizer.apply_chat_template(list(messages))], sampling)[0]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt, yielding text as it comes."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        for _, _, delta in self._run([ids], _as_params(sampling, 1)):
            if delta:
                yield delta

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, TokenEvent, str]]:
        """Yield (prompt index, event, text delta); a stop string turns the event into the sequence's last one."""
        index_of: dict[str, int] = {}
        detokenizers = []
        try:
            for i, (ids, sampling) in enumerate(zip(prompts, params, strict=True)):
                request = Request(f"llm-{next(self._ids)}", tuple(ids), sampling)
                self._engine.submit(request)
                index_of[request.request_id] = i
                detokenizers.append(IncrementalDetokenizer(self.tokenizer, ids, sampling))
            while index_of:
                for event in self._engine.step():
                    i = index_of[event.request_id]
                    if event.error is not None:
                        raise event.error
                    delta, event = _decode(detokenizers[i], event)
                    if event.finish_reason is not None:
                        del index_of[event.request_id]
                        self._engine.abort(event.request_id)
                    yield i, event, delta
        finally:
            for request_id in index_of:
                self._engine.abort(request_id)


def _decode(detokenizer: IncrementalDetokenizer, event: TokenEvent) -> tuple[str, TokenEvent]:
    """The text that is now certain, and the event, cut behind the token that completed a stop string."""
    visible = event.token_ids if event.stop_token_id is None else event.token_ids[:-1]
    delta = ""
    for used, token_id in enumerate(visible, start=1):
        delta += detokenizer.push([token_id])
        if detokenizer.stopped_on is not None:
            token_ids, logprobs = event.token_ids[:used], event.logprobs[:used]
            return delta, replace(
                event, token_ids=token_ids, logprobs=logprobs, finish_reason="stop", stop_token_id=None
            )
    if event.finish_reason is not None:
        delta += detokenizer.finish()
    return delta, event


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and isinstance(items[0], int):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _as_params(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        given = [sampling or SamplingParams()] * count
    else:
        given = list(sampling)
        if len(given) != count:
            raise ValueError(f"{len(given)} sampling parameters for {count} prompts")
    return [p if p.seed is not None else replace(p, seed=secrets.randbits(63)) for p in given]


def _ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""
