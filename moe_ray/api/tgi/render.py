"""TGI's responses, whole or as server-sent events, from what the choices of a job have become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from moe_ray.api.failure import failure_of
from moe_ray.api.output import ChoiceOutput, Delta, JobOutput
from moe_ray.api.sse import dumps
from moe_ray.api.tgi.errors import stream_error
from moe_ray.api.tgi.parse import is_sampled, parameters_of, unsigned
from moe_ray.api.tgi.schemas import TgiGenerateBody
from moe_ray.core import SamplingParams, TokenLogprobs
from moe_ray.errors import IncompleteGeneration
from moe_ray.text.detokenizer import IncrementalDetokenizer
from moe_ray.text.tokenizer import Tokenizer

_MIN_LOGPROB: Final = -9999.0  # JSON has no -inf


def event(value: Any) -> str:
    """One event as TGI writes it: without a space behind `data:`."""
    return f"data:{dumps(value)}\n\n"


class TgiRenderer:
    """The response to one job. `whole` after all its tokens, or `chunk` with each step's."""

    def __init__(
        self, output: JobOutput, *, body: TgiGenerateBody, tokenizer: Tokenizer, full_text: bool, in_list: bool = False
    ) -> None:
        """`full_text`: the generated text begins with the input. `in_list`: a whole response is a list of one."""
        self._output, self._tokenizer = output, tokenizer
        self._asked = parameters_of(body)
        self._sampled = is_sampled(self._asked)
        self._before = body.inputs if full_text else ""
        self._in_list = in_list
        self._texts: list[_TokenTexts] = [_TokenTexts(tokenizer, choice) for choice in output.choices]
        self._streamed: list[str] = []
        """Text of a stream so far."""
        self._index = 0
        self._ended = False
        """The event with the whole text was written."""

    @property
    def best(self) -> int:
        """The choice whose tokens are the likeliest: the one that is answered."""
        choices = self._output.choices
        return max(range(len(choices)), key=lambda i: choices[i].mean_logprob)

    def whole(self) -> Any:
        """The response to a job whose choices are all finished; one without an end raises `IncompleteGeneration`."""
        for choice in self._output.choices:
            _finish_reason(choice)
        best = self.best
        says: dict[str, Any] = {"generated_text": self._text(self._output.choices[best])}
        if self._asked.details or self._asked.decoder_input_details:
            details = self._sequence(best)
            others = [i for i in range(len(self._output.choices)) if i != best]
            if others:
                details["best_of_sequences"] = [
                    {"generated_text": self._text(self._output.choices[i]), **self._sequence(i)} for i in others
                ]
            says["details"] = details
        return [says] if self._in_list else says

    def chunk(self, delta: Delta) -> str:
        """One event for each token of one engine step. Raises `IncompleteGeneration` as `whole`."""
        choice = self._output.choices[delta.index]
        if delta.finish_reason is not None:
            _finish_reason(choice)
        self._streamed.append(delta.text)
        told = self._texts[delta.index].push(delta.logprobs)
        last = len(delta.logprobs) - 1 if delta.finish_reason is not None else -1
        events = []
        for i, (at, text) in enumerate(zip(delta.logprobs, told, strict=True)):
            self._index += 1
            says: dict[str, Any] = {"index": self._index, "token": self._token(at.token_id, at.logprob, text)}
            if self._asked.top_n_tokens:
                says["top_tokens"] = self._top(at)
            says["generated_text"] = self._streamed_text(choice) if i == last else None
            says["details"] = self._stream_details(choice) if i == last and self._asked.details else None
            self._ended |= i == last
            events.append(event(says))
        return "".join(events)

    def completed(self) -> str:
        """Nothing follows the event with the text. Raises `IncompleteGeneration` where there was no such event."""
        if not self._ended:
            raise IncompleteGeneration("a sequence ended without a last token")
        return ""

    def failed(self, error: Exception) -> str:
        """The body of an error response, as an event."""
        return event(stream_error(failure_of(error)))

    def closing(self) -> str:
        """TGI's streams end without a mark."""
        return ""

    def _streamed_text(self, choice: ChoiceOutput) -> str:
        return self._before + "".join(self._streamed) + _stop_string(choice)

    def _text(self, choice: ChoiceOutput) -> str:
        return self._before + "".join(choice.text) + _stop_string(choice)

    def _stream_details(self, choice: ChoiceOutput) -> dict[str, Any]:
        return {
            "finish_reason": _finish_reason(choice),
            "generated_tokens": choice.num_tokens,
            "seed": self._seed(choice),
            "input_length": len(choice.request.prompt_token_ids),
        }

    def _sequence(self, index: int) -> dict[str, Any]:
        choice = self._output.choices[index]
        texts = self._texts[index].push(choice.logprobs)
        says: dict[str, Any] = {
            "finish_reason": _finish_reason(choice),
            "generated_tokens": choice.num_tokens,
            "seed": self._seed(choice),
            "prefill": self._prefill(choice),
            "tokens": [
                self._token(at.token_id, at.logprob, text) for at, text in zip(choice.logprobs, texts, strict=True)
            ],
        }
        if self._asked.top_n_tokens:
            says["top_tokens"] = [self._top(at) for at in choice.logprobs]
        return says

    def _prefill(self, choice: ChoiceOutput) -> list[dict[str, Any]]:
        """The tokens of the input, where they are asked for; the first one has no log-probability."""
        if not self._asked.decoder_input_details:
            return []
        return [
            {
                "id": token_id,
                "text": self._tokenizer.token_to_str(token_id),
                "logprob": None if at is None else max(at.logprob, _MIN_LOGPROB),
            }
            for token_id, at in zip(choice.request.prompt_token_ids, choice.prompt_logprobs, strict=True)
        ]

    def _token(self, token_id: int, logprob: float, text: str) -> dict[str, Any]:
        special = token_id in self._tokenizer.special_ids
        return {"id": token_id, "text": text, "logprob": max(logprob, _MIN_LOGPROB), "special": special}

    def _top(self, at: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._token(i, logprob, self._tokenizer.token_to_str(i)) for i, logprob in at.top]

    def _seed(self, choice: ChoiceOutput) -> int | None:
        seed = choice.request.sampling.seed
        return unsigned(seed) if self._sampled and seed is not None else None


class _TokenTexts:
    """The text that each token of one choice adds, special tokens and stop strings included."""

    def __init__(self, tokenizer: Tokenizer, choice: ChoiceOutput) -> None:
        shown = SamplingParams(skip_special_tokens=False)
        self._detokenizer = IncrementalDetokenizer(tokenizer, choice.request.prompt_token_ids, shown)

    def push(self, logprobs: Sequence[TokenLogprobs]) -> list[str]:
        """The texts of the next tokens; "" of one that ends within a character."""
        return [self._detokenizer.push((at.token_id,)) for at in logprobs]


def _stop_string(choice: ChoiceOutput) -> str:
    """The stop string that ended a text: TGI's texts end with it."""
    return choice.stop_reason if isinstance(choice.stop_reason, str) else ""


def _finish_reason(choice: ChoiceOutput) -> str:
    """TGI's word for the end of a sequence. Raises `IncompleteGeneration` for one that was ended from outside."""
    if choice.finish_reason == "length":
        return "length"
    if choice.finish_reason == "stop":
        return "stop_sequence" if isinstance(choice.stop_reason, str) else "eos_token"
    raise IncompleteGeneration(f"a sequence ended as {choice.finish_reason}")
