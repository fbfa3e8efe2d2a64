"""OpenAI's responses, whole or as server-sent events, from what the choices of a job have become."""

from __future__ import annotations

import base64
import codecs
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np

from moe_ray import __version__
from moe_ray.api.failure import failure_of
from moe_ray.api.openai.errors import error_body
from moe_ray.api.openai.schemas import Body
from moe_ray.api.output import ChoiceOutput, Delta, JobOutput
from moe_ray.api.sse import dumps, event
from moe_ray.core import TokenLogprobs
from moe_ray.text.tokenizer import Tokenizer

DONE: Final = "data: [DONE]\n\n"
FINGERPRINT: Final = f"moe_ray-{__version__}"
"""What computed an answer; some clients insist on it."""
_MIN_LOGPROB: Final = -9999.0  # JSON has no -inf; the value OpenAI uses


Likely = tuple[int, TokenLogprobs | None]
"""A token and its log-probabilities; the first of a prompt has none."""


@dataclass(slots=True, eq=False)
class Told:
    """What the chunks of one choice have told, and what begins each of them."""

    head: str
    """A chunk's JSON up to and including the choice's index."""
    started: bool = False
    routed: int = 0
    """Positions whose experts were told."""
    offset: int = 0
    """Characters of text before the next token, for `text_offset`."""
    characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )


class OpenAIRenderer:
    """The response to one job. What differs between the two endpoints is in the subclasses."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    nothing: ClassVar[str]
    """What the choice of a chunk without text says."""

    def __init__(self, output: JobOutput, *, tokenizer: Tokenizer, model: str, created: int | None = None) -> None:
        self._output = output
        self._tokenizer = tokenizer
        self._meta = {
            "id": output.job.job_id,
            "object": self.object_name,
            "created": int(time.time()) if created is None else created,
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        # A chunk is written for each token of each stream: all that never changes is serialised here, once.
        self._head = "data: " + dumps({**self._meta, "object": self.chunk_name})[:-1] + ',"choices":['
        self._told = [Told(f'{self._head}{{"index":{i},') for i in range(len(output.choices))]

    @classmethod
    def for_body(cls, body: Body) -> type[OpenAIRenderer]:
        """The renderer of the response to a request."""
        return cls

    def whole(self) -> dict[str, Any]:
        """The response object of a job whose choices are all finished."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._output.told())]
        return {**self._meta, "choices": choices, "usage": self._usage()}

    def chunk(self, delta: Delta) -> str:
        """One engine step; "" where there is nothing to say yet (held-back text, half a character)."""
        told, choice = self._told[delta.index], self._output.choices[delta.index]
        if not delta.token_ids and delta.finish_reason is None:
            return ""  # its prompt is not computed to the end
        usage, text, opening = self._usage_part(), delta.text, ""
        logprobs: list[Likely] = []
        if not told.started:
            told.started = True
            opening = self._opening(told, choice, usage)
            text = (self._output.job.choices[delta.index].echo or "") + text
            logprobs = self._echoed(choice)
        logprobs += [(entry.token_id, entry) for entry in delta.logprobs[: delta.num_visible]]
        with_logprobs = bool(logprobs) and self._output.job.report.logprobs
        token_ids = self._output.job.report.token_ids
        *before, last = self._deltas(delta, text) or [""]
        if not (last or with_logprobs or token_ids or delta.finish_reason):
            return opening
        likely = dumps(self._logprobs(told, logprobs)) if with_logprobs else "null"
        reason = "null"
        if delta.finish_reason is not None:
            reason = f'"{self._reason(choice)}","stop_reason":{dumps(choice.stop_reason)}'
            if choice.degraded:
                reason += f',"degraded_positions":{dumps(choice.degraded)}'
        extra = self._routed_part(told, choice)
        if token_ids:
            extra += f',"token_ids":{dumps(delta.token_ids)}'
        for says in before:
            opening += f'{told.head}{says},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        return (
            f'{opening}{told.head}{last or self.nothing},"logprobs":{likely},"finish_reason":{reason}{extra}}}]'
            f"{usage}}}\n\n"
        )

    def completed(self) -> str:
        """The usage, where it is asked for."""
        return f'{self._head}],"usage":{dumps(self._usage())}}}\n\n' if self._output.job.report.usage else ""

    def failed(self, error: Exception) -> str:
        """The body of an error response, as an event."""
        return event(error_body(failure_of(error)))

    def closing(self) -> str:
        """OpenAI's mark for the end."""
        return DONE

    def _message(self, text: str, choice: ChoiceOutput) -> dict[str, Any]:
        """What a whole choice says."""
        raise NotImplementedError

    def _deltas(self, delta: Delta, text: str) -> list[str]:
        """What an engine step makes a choice say, chunk by chunk, each as JSON without braces."""
        raise NotImplementedError

    def _reason(self, choice: ChoiceOutput) -> str | None:
        """Why a choice has ended."""
        return choice.finish_reason

    def _opening(self, told: Told, choice: ChoiceOutput, usage: str) -> str:
        """The chunk before a choice's first one."""
        raise NotImplementedError

    def _logprobs(self, told: Told, logprobs: Sequence[Likely]) -> dict[str, Any]:
        """Log-probabilities of consecutive tokens."""
        raise NotImplementedError

    def _echoed(self, choice: ChoiceOutput) -> list[Likely]:
        """Those of the prompt's tokens, where the response repeats the prompt."""
        return []

    def _choice(self, index: int, choice: ChoiceOutput) -> dict[str, Any]:
        text = (self._output.job.choices[choice.index].echo or "") + "".join(choice.text)
        asked, told, report = choice.request.sampling, self._told[choice.index], self._output.job.report
        likely = self._echoed(choice)
        likely += [(entry.token_id, entry) for entry in choice.logprobs[: choice.num_visible]]
        says: dict[str, Any] = {
            "index": index,
            **self._message(text, choice),
            "logprobs": self._logprobs(told, likely) if report.logprobs else None,
            "finish_reason": self._reason(choice),
            "stop_reason": choice.stop_reason,
        }
        if report.token_ids:
            says["token_ids"] = choice.token_ids
        if choice.degraded:
            says["degraded_positions"] = choice.degraded
        if asked.return_routed_experts:
            says["routed_experts"] = _npy(choice.routed_experts())
        return says

    def _of_prompt(self, choice: ChoiceOutput) -> dict[str, Any]:
        """What is asked for of a prompt: its token ids, their log-probabilities as vLLM writes them."""
        report, found = self._output.job.report, dict[str, Any]()
        if report.token_ids:
            found["prompt_token_ids"] = choice.request.prompt_token_ids
        if report.prompt_logprobs:
            found["prompt_logprobs"] = [None if at is None else self._ranked(at) for at in choice.prompt_logprobs]
        return found

    def _ranked(self, at: TokenLogprobs) -> dict[int, dict[str, Any]]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(at.top, 1)]
        return {
            token_id: {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": self._tokenizer.token_to_str(token_id),
            }
            for token_id, logprob, rank in [(at.token_id, at.logprob, at.rank), *ranked]
        }

    def _spelled(self, token_id: int) -> str | None:
        """A token as `return_tokens_as_token_ids` asks for it; None where it is to be its text."""
        return f"token_id:{token_id}" if self._output.job.report.tokens_as_ids else None

    def _routed_part(self, told: Told, choice: ChoiceOutput) -> str:
        """The experts of the positions that no chunk before told, as JSON members; "" where there are none.

        `routed_experts` is [positions, num_hidden_layers, num_experts_per_tok] as vLLM writes it: base64 of a .npy
        file. Of a chunk it begins at position `routed_experts_start`.
        """
        start, end = told.routed, choice.num_routed
        if not choice.request.sampling.return_routed_experts or end <= start:
            return ""
        told.routed = end
        return f',"routed_experts_start":{start},"routed_experts":{dumps(_npy(choice.routed_experts(start)))}'

    def _usage_part(self) -> str:
        report = self._output.job.report
        if report.continuous_usage:
            return f',"usage":{dumps(self._usage())}'
        return ',"usage":null' if report.usage else ""

    def _usage(self) -> dict[str, Any]:
        usage = self._output.usage()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }


class CompletionRenderer(OpenAIRenderer):
    """Responses of /v1/completions."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"
    nothing = '"text":""'

    def _message(self, text: str, choice: ChoiceOutput) -> dict[str, Any]:
        return {"text": text}

    def _deltas(self, delta: Delta, text: str) -> list[str]:
        return [f'"text":{dumps(text)}'] if text else []

    def _opening(self, told: Told, choice: ChoiceOutput, usage: str) -> str:
        return ""

    def _choice(self, index: int, choice: ChoiceOutput) -> dict[str, Any]:
        return {**super()._choice(index, choice), **self._of_prompt(choice)}

    def _echoed(self, choice: ChoiceOutput) -> list[Likely]:
        if self._output.job.choices[choice.index].echo is None or not self._output.job.report.logprobs:
            return []
        return list(zip(choice.request.prompt_token_ids, choice.prompt_logprobs, strict=True))

    def _logprobs(self, told: Told, logprobs: Sequence[Likely]) -> dict[str, Any]:
        offsets = []
        for token_id, _ in logprobs:
            offsets.append(told.offset)
            told.offset += len(told.characters.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "text_offset": offsets,
            "token_logprobs": [None if at is None else finite(at.logprob) for _, at in logprobs],
            "tokens": [self._name(token_id) for token_id, _ in logprobs],
            "top_logprobs": [
                None
                if at is None
                else {self._name(i): finite(logprob) for i, logprob in (*at.top, (at.token_id, at.logprob))}
                for _, at in logprobs
            ],
        }

    def _name(self, token_id: int) -> str:
        """A token as the completions format writes it: parts of characters as `bytes:\\xe4`, so that none collide."""
        if (as_id := self._spelled(token_id)) is not None:
            return as_id
        spelled = self._tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return logprob if logprob > _MIN_LOGPROB else _MIN_LOGPROB


def _npy(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")
