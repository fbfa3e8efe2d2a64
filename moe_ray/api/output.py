"""What each choice of a job has become, from the token events of its sequence; the same for every API and offline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from moe_ray.api.job import GenerationJob
from moe_ray.core import FinishReason, Request, TokenEvent, TokenLogprobs
from moe_ray.engine.routed_experts import RoutedRows
from moe_ray.errors import ProtocolError
from moe_ray.text.answers.parts import Answer, AnswerReader, Part
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step added to one choice."""

    index: int
    text: str = ""
    """That is certain now: no half character, no beginning of a stop string."""
    token_ids: tuple[int, ...] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    """Of `token_ids`, where they are asked for."""
    num_visible: int = 0
    """How many of `token_ids` are part of the text: not a stop token at their end."""
    finish_reason: FinishReason | None = None
    parts: Sequence[Part] = ()
    """What `text` is made of, where the choice has a reader; it may hold back text of its own."""


class ChoiceOutput:
    """One sequence of a response: text up to its stop string, and all that is reported of it.

    Fields are complete once `finish_reason` is set; `text`, `token_ids` and `logprobs` stay empty unless `keep`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        *,
        index: int = 0,
        prompt_index: int = 0,
        keep: bool = True,
        reader: AnswerReader | None = None,
    ) -> None:
        """`reader` takes the text apart into `Delta.parts`; what they come to is in `answer`, whatever `keep` is."""
        self.request: Final = request
        self.prompt_index: Final = prompt_index
        self.text: list[str] = []
        self.answer = Answer()
        """Content and tool calls, where there is a reader."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        scored = request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] if scored else []
        """Of each prompt token, where they are asked for; the first has none. Kept whatever `keep` is."""
        self.num_visible = 0
        """How many of the tokens are part of the text."""
        self.num_tokens = 0
        self.num_cached = 0
        """Prompt tokens found in the prefix cache."""
        self.queue_s = 0.0
        """How long it waited in its trunk before it was first computed."""
        self.degraded: list[int] = []
        """Positions that were computed without one of their experts."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        """The stop string, or the token of `stop_token_ids`, that ended it."""
        self.first_token_s: float | None = None
        """When its first token came, by `time.monotonic`."""
        self.last_token_s: float | None = None
        """When its latest token came."""
        self.index: Final = index
        self._keep, self._reader = keep, reader
        shown_ids = frozenset[int]() if reader is None else reader.shown_ids
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_token_ids, request.sampling, shown_ids)
        self._routed = RoutedRows()

    def take(self, event: TokenEvent) -> Delta:
        """Account for one engine step. A stop string ends the choice, whatever the engine computes behind it.

        Raises the event's error, and `ProtocolError` where routed experts or prompt_logprobs leave a position out.
        """
        if event.error is not None:
            raise event.error
        self.num_cached = max(self.num_cached, event.num_cached_tokens)
        self.queue_s = max(self.queue_s, event.queue_s)
        self.degraded += event.degraded_positions
        if event.prompt_logprobs:
            self._take_prompt(event)
        if event.routed_experts is not None:
            self._routed.take(event.routed_experts)
        detokenizer, sampling = self._detokenizer, self.request.sampling
        counted, visible = event.token_ids, event.token_ids
        if event.stop_token_id is not None and not sampling.include_stop_str_in_output:
            visible = visible[:-1]
        text, used = "", 0
        while used < len(visible) and detokenizer.stopped_on is None:
            text += detokenizer.push((visible[used],))
            used += 1
        if event.finish_reason is not None:
            text += detokenizer.finish()
            self.finish_reason = event.finish_reason
            if event.stop_token_id in sampling.stop_token_ids:
                self.stop_reason = event.stop_token_id
        if detokenizer.stopped_on is not None:
            # Tokens that came in one step with the end of a stop string, but after it, are no part of the answer.
            counted = counted[:used]
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped_on
        self.num_tokens += len(counted)
        if counted:
            self.last_token_s = time.monotonic()
            self.first_token_s = self.first_token_s or self.last_token_s
        logprobs = event.logprobs[: len(counted)]
        delta = Delta(self.index, text, counted, logprobs, used, self.finish_reason, self._parts(text))
        if self._keep:
            self._append(delta)
        return delta

    def finish_empty(self) -> Delta:
        """End a choice of which no token was asked for."""
        self.finish_reason = "length"
        return Delta(self.index, finish_reason="length")

    @property
    def mean_logprob(self) -> float:
        """Of its tokens so far; that of no token is 0."""
        return sum(entry.logprob for entry in self.logprobs) / max(len(self.logprobs), 1)

    @property
    def num_routed(self) -> int:
        """Positions of the answer whose experts are known; none where they are not asked for.

        Position i is token i of prompt and output; the last token of the output is not computed.
        """
        # The engine may have computed tokens behind the end of a stop string: no part of the answer.
        return min(len(self.request.prompt_token_ids) + self.num_tokens - 1, self._routed.count)

    def routed_experts(self, start: int = 0) -> np.ndarray:
        """The experts of positions `start` to `num_routed`, [positions, num_hidden_layers, num_experts_per_tok]."""
        return self._routed.rows(start, self.num_routed)

    def _take_prompt(self, event: TokenEvent) -> None:
        """Add what is new of the prompt: a replay on another trunk tells positions again."""
        start, known = event.prompt_logprobs_start, len(self.prompt_logprobs)
        if start > known:
            raise ProtocolError(f"log-probabilities from position {start} on do not follow {known} known ones")
        self.prompt_logprobs += event.prompt_logprobs[known - start :]

    def _parts(self, text: str) -> list[Part]:
        """Take the next text apart, to its end once the choice is finished."""
        if self._reader is None:
            return []
        parts = self._reader.push(text)
        if self.finish_reason is not None:
            parts += self._reader.finish()
        self.answer.take(parts)
        return parts

    def _append(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.num_visible += delta.num_visible


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a job took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the prompts: found in the prefix cache."""


@dataclass(slots=True, eq=False)
class JobOutput:
    """All choices of a job."""

    job: GenerationJob
    choices: list[ChoiceOutput] = field(default_factory=list)
    num_unfinished: int = 0

    @classmethod
    def of(cls, job: GenerationJob, tokenizer: Tokenizer) -> JobOutput:
        """Nothing yet of a job. A stream keeps no text: it was sent."""
        choices = [
            ChoiceOutput(
                tokenizer,
                each.request,
                index=i,
                prompt_index=each.prompt_index,
                keep=not job.stream,
                reader=None if each.make_reader is None else each.make_reader(),
            )
            for i, each in enumerate(job.choices)
        ]
        return cls(job, choices, len(choices))

    def take(self, index: int, event: TokenEvent) -> Delta | None:
        """Account for one event of a choice; None for one that is finished already. Raises as `ChoiceOutput.take`."""
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return None
        delta = choice.take(event)
        self.num_unfinished -= delta.finish_reason is not None
        return delta

    def finish_empty(self) -> list[Delta]:
        """End the choices that no engine request was made for."""
        empty = [c for c in self.choices if c.request.sampling.empty and c.finish_reason is None]
        self.num_unfinished -= len(empty)
        return [choice.finish_empty() for choice in empty]

    def told(self) -> list[ChoiceOutput]:
        """The choices that a whole response tells: all, or of each prompt's the likeliest by mean log-probability."""
        best = self.job.report.best
        if best is None:
            return self.choices
        ranked = sorted(self.choices, key=lambda choice: (choice.prompt_index, -choice.mean_logprob))
        per_prompt = len(self.choices) // (self.choices[-1].prompt_index + 1)
        return [choice for i, choice in enumerate(ranked) if i % per_prompt < best]

    @property
    def num_degraded(self) -> int:
        """Tokens so far that were computed without one of their experts."""
        return sum(len(choice.degraded) for choice in self.choices)

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompts = {choice.prompt_index: choice for choice in reversed(self.choices)}.values()
        return Usage(
            sum(len(choice.request.prompt_token_ids) for choice in prompts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.num_cached for choice in prompts),
        )
