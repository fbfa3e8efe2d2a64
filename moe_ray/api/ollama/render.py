"""Ollama's answers, whole or as lines of JSON, from what the one choice of a job has become."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pydantic_core import from_json

from moe_ray.api.failure import failure_of
from moe_ray.api.ollama.errors import error_body
from moe_ray.api.output import Delta, JobOutput
from moe_ray.api.sse import dumps
from moe_ray.core import TokenLogprobs
from moe_ray.text.answers.parts import CallArguments, CallBegun, Part, Text, ToolCall
from moe_ray.text.tokenizer import Tokenizer

MEDIA_TYPE: Final = "application/x-ndjson"
_MIN_LOGPROB: Final = -9999.0  # JSON has no -inf


def now() -> str:
    """The time as ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaRenderer:
    """The answer to one request. What differs between the two endpoints is in the subclasses."""

    def __init__(self, output: JobOutput, *, tokenizer: Tokenizer, model: str, received_s: float) -> None:
        """`received_s` is when the request came, by `time.monotonic`; the engine is asked next."""
        self._output = output
        self._choice = output.choices[0]
        self._tokenizer = tokenizer
        self._model = model
        self._received_s = received_s
        self._asked_s = time.monotonic()
        self._begun: ToolCall | None = None
        """The call whose arguments are arriving: a line tells a whole call."""
        self._num_calls = 0
        self._unread: list[TokenLogprobs] = []
        """Of tokens whose text no line has told yet."""

    def whole(self) -> dict[str, Any]:
        """The answer, once it is finished."""
        answer, choice = self._choice.answer, self._choice
        calls = [_call(i, call) for i, call in enumerate(answer.calls)]
        says = {
            **self._head(),
            **self._says(answer.content, calls),
            **self._ending(choice.token_ids[: choice.num_visible]),
        }
        if choice.request.sampling.logprobs is not None:
            says["logprobs"] = self._likely(choice.logprobs[: choice.num_visible])
        return says

    def chunk(self, delta: Delta) -> str:
        """What one step added: lines of text and of calls, and the last one."""
        self._keep(delta)
        self._unread += delta.logprobs[: delta.num_visible]
        lines: list[dict[str, Any]] = []
        for part in delta.parts:
            lines += self._lines(part)
        if delta.finish_reason is not None:
            lines += self._call_lines()
            lines.append({**self._says("", []), **self._ending(self._told_ids())})
        if self._choice.request.sampling.logprobs is not None and lines:
            lines[0]["logprobs"] = self._likely(self._unread)
            self._unread = []
        return "".join(f"{dumps({**self._head(), 'done': False, **line})}\n" for line in lines)

    def completed(self) -> str:
        """Nothing: the last chunk says that the answer is done."""
        return ""

    def failed(self, error: Exception) -> str:
        """The body of an error response, as a line."""
        return f"{dumps(error_body(failure_of(error)))}\n"

    def closing(self) -> str:
        """Nothing."""
        return ""

    def _says(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The fields of an answer, or of a line, that hold what the model says."""
        raise NotImplementedError

    def _keep(self, delta: Delta) -> None:
        """Remember what the last line of a stream needs."""

    def _told_ids(self) -> Sequence[int]:
        """The tokens that `_keep` has remembered."""
        return ()

    def _context(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """What a later request may send to go on from this answer."""
        return {}

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _lines(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Text(text):
                return [*self._call_lines(), self._says(text, [])] if text else []
            case CallBegun(_, call_id, name):
                before = self._call_lines()
                self._begun = ToolCall(call_id, name, "")
                return before
            case CallArguments(_, arguments):
                assert self._begun is not None, "arguments belong to a call that has begun"
                self._begun.arguments += arguments
                return []

    def _call_lines(self) -> list[dict[str, Any]]:
        """The line of the call whose arguments are complete now."""
        if self._begun is None:
            return []
        call = _call(self._num_calls, self._begun)
        self._begun = None
        self._num_calls += 1
        return [self._says("", [call])]

    def _ending(self, token_ids: Sequence[int]) -> dict[str, Any]:
        choice = self._choice
        ended_s = time.monotonic()
        first_s = choice.first_token_s or ended_s
        last_s = choice.last_token_s or ended_s
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            **self._context(token_ids),
            "total_duration": _ns(ended_s - self._received_s),
            "load_duration": _ns(self._asked_s - self._received_s),
            "prompt_eval_count": len(choice.request.prompt_token_ids),
            "prompt_eval_duration": _ns(first_s - self._asked_s),
            "eval_count": choice.num_tokens,
            "eval_duration": _ns(last_s - first_s),
        }

    def _likely(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        asked = self._choice.request.sampling.logprobs
        return [
            {
                **self._token(at.token_id, at.logprob),
                **({"top_logprobs": [self._token(*top) for top in at.top]} if asked else {}),
            }
            for at in logprobs
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token_id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, _MIN_LOGPROB),
            "bytes": list(spelled),
        }


class GenerateRenderer(OllamaRenderer):
    """Answers of /api/generate."""

    _ids: tuple[int, ...] = ()
    _text = ""

    def _says(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"response": text}

    def _keep(self, delta: Delta) -> None:
        self._ids += delta.token_ids[: delta.num_visible]
        self._text += delta.text

    def _told_ids(self) -> Sequence[int]:
        return self._ids

    def _context(self, token_ids: Sequence[int]) -> dict[str, Any]:
        said: Sequence[int] = token_ids
        if isinstance(self._choice.stop_reason, str):  # the stop string is no part of the answer
            text = self._text or self._choice.answer.content
            said = self._tokenizer.encode(text, add_special_tokens=False) if text else ()
        return {"context": [*self._choice.request.prompt_token_ids, *said]}


class ChatLinesRenderer(OllamaRenderer):
    """Answers of /api/chat."""

    def _says(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        return {"message": {**message, "tool_calls": list(calls)} if calls else message}


def _call(index: int, call: ToolCall) -> dict[str, Any]:
    # Ollama's arguments are an object: of a call that the length has cut, the members that were complete.
    arguments = from_json(call.arguments or "{}", allow_partial=True)
    return {"id": call.call_id, "function": {"index": index, "name": call.name, "arguments": arguments}}


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
