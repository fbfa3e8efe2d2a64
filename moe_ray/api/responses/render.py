"""A response while it comes into being: its output items, and the events that tell of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from moe_ray.api.failure import Failure, failure_of
from moe_ray.api.output import Delta, JobOutput
from moe_ray.api.responses.body import error_of
from moe_ray.api.responses.conversation import Item, new_id
from moe_ray.api.sse import event
from moe_ray.core import TokenLogprobs
from moe_ray.text.answers.parts import CallArguments, CallBegun, Text
from moe_ray.text.tokenizer import Tokenizer

Event = dict[str, Any]
_MIN_LOGPROB: Final = -9999.0  # JSON has no -inf; the value OpenAI uses
_PADDED: Final = 32
"""Characters, of which a delta with its obfuscation has a multiple."""


@dataclass(slots=True)
class _Message:
    index: int
    item_id: str = field(default_factory=lambda: new_id("msg"))
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: str) -> Item:
        head = {"id": self.item_id, "type": "message", "status": status, "role": "assistant"}
        return {**head, "content": [] if status == "in_progress" else [self.part()]}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "annotations": [], "logprobs": list(self.logprobs), "text": self.text}


@dataclass(slots=True)
class _Call:
    index: int
    call_id: str
    name: str
    item_id: str = field(default_factory=lambda: new_id("fc"))
    arguments: str = ""

    def item(self, status: str) -> Item:
        said = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"id": self.item_id, "type": "function_call", "status": status, **said}


class GrowingResponse:
    """The answer to one request, from the parts of its only choice. `take` and `end` return the events they make."""

    def __init__(self, output: JobOutput, echo: dict[str, Any], tokenizer: Tokenizer, status: str) -> None:
        """`echo`: the fields that repeat the request."""
        self.response_id = output.job.job_id
        self.status = status
        self.echo = echo
        self._output, self._tokenizer = output, tokenizer
        self._created = int(time.time())
        self._completed: int | None = None
        self._error: dict[str, str] | None = None
        self._items: list[Item] = []
        """Those that are done."""
        self._open: _Message | _Call | None = None
        self._pending: list[TokenLogprobs] = []
        """Of tokens whose text is not told yet."""

    def whole(self) -> dict[str, Any]:
        """The response object as it is now."""
        cut_off = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        degraded = self._output.choices[0].degraded
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self.status,
            "error": self._error,
            "incomplete_details": cut_off,
            "output": list(self._items),
            "usage": None if self.status in ("queued", "in_progress") else self._usage(),
            **self.echo,
            **({"degraded_positions": list(degraded)} if degraded else {}),
        }

    def lifecycle(self, kind: str) -> Event:
        """An event that carries the whole response, e.g. `response.created`."""
        return {"type": f"response.{kind}", "response": self.whole()}

    def take(self, delta: Delta) -> list[Event]:
        """Account for one engine step."""
        if self._output.choices[0].request.sampling.logprobs is not None:
            self._pending += delta.logprobs[: delta.num_visible]
        events: list[Event] = []
        for part in delta.parts:
            match part:
                case Text(text):
                    events += self._take_text(text)
                case CallBegun(_, call_id, name):
                    events += self._close("completed")
                    call = _Call(len(self._items), call_id, name)
                    events.append(self._begin(call))
                case CallArguments(_, json):
                    events += self._take_arguments(json)
        return events

    def end(self) -> list[Event]:
        """Account for the end of the choice."""
        events: list[Event] = []
        if self._open is None and not self._items:
            events += self._begin_message()
        self.status = "incomplete" if self._output.choices[0].finish_reason == "length" else "completed"
        events += self._close(self.status)
        if self.status == "completed":
            self._completed = int(time.time())
        return [*events, self.lifecycle(self.status)]

    def fail(self, failure: Failure) -> list[Event]:
        """Account for what ended it instead of an answer; what there is of it is kept."""
        events = self._close("incomplete")
        self.status, self._error = "failed", error_of(failure)
        return [*events, self.lifecycle("failed")]

    def _take_text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._open, _Message):
            events += self._close("completed")
            events += self._begin_message()
        message = self._open
        assert isinstance(message, _Message)
        likely = self._told_logprobs()
        message.text += text
        message.logprobs += likely
        told = {"item_id": message.item_id, "output_index": message.index, "content_index": 0}
        events.append({"type": "response.output_text.delta", **told, "delta": text, "logprobs": likely})
        return events

    def _take_arguments(self, json: str) -> list[Event]:
        call = self._open
        assert isinstance(call, _Call), "arguments belong to the call that began last"
        call.arguments += json
        told = {"item_id": call.item_id, "output_index": call.index, "delta": json}
        return [{"type": "response.function_call_arguments.delta", **told}]

    def _begin_message(self) -> list[Event]:
        message = _Message(len(self._items))
        begun = self._begin(message)
        told = {"item_id": message.item_id, "output_index": message.index, "content_index": 0}
        return [begun, {"type": "response.content_part.added", **told, "part": message.part()}]

    def _begin(self, item: _Message | _Call) -> Event:
        self._open = item
        if isinstance(item, _Call):
            self._pending.clear()
        return {"type": "response.output_item.added", "output_index": item.index, "item": item.item("in_progress")}

    def _close(self, status: str) -> list[Event]:
        """End the item that is open, if there is one."""
        match self._open:
            case _Message() as message:
                rest = self._told_logprobs()
                message.logprobs += rest
                told = {"item_id": message.item_id, "output_index": message.index, "content_index": 0}
                text = {"text": message.text, "logprobs": list(message.logprobs)}
                events = [
                    {"type": "response.output_text.done", **told, **text},
                    {"type": "response.content_part.done", **told, "part": message.part()},
                ]
                item = message.item(status)
            case _Call() as call:
                told = {"item_id": call.item_id, "output_index": call.index}
                said = {"name": call.name, "arguments": call.arguments}
                events = [{"type": "response.function_call_arguments.done", **told, **said}]
                item = call.item(status)
            case None:
                return []
        done = {"type": "response.output_item.done", "output_index": self._open.index, "item": item}
        self._items.append(item)
        self._open = None
        return [*events, done]

    def _told_logprobs(self) -> list[dict[str, Any]]:
        told = [
            {**self._entry(at.token_id, at.logprob), "top_logprobs": [self._entry(*top) for top in at.top]}
            for at in self._pending
        ]
        self._pending.clear()
        return told

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token_id)
        likely = max(logprob, _MIN_LOGPROB)
        return {"token": spelled.decode("utf-8", "replace"), "bytes": list(spelled), "logprob": likely}

    def _usage(self) -> dict[str, Any]:
        usage = self._output.usage()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


class ResponseEvents:
    """Writes the events of a response, numbered from 0: a `StreamRenderer`, but `last` writes the last one."""

    def __init__(
        self,
        response: GrowingResponse,
        told: Callable[[Exception], Exception] = lambda error: error,
        obfuscate: bool = False,
    ) -> None:
        """`told`: an error as clients of this API are told of it."""
        self.response = response
        self._told = told
        self._obfuscate = obfuscate
        self._number = 0
        self._last: Event | None = None

    def opening(self, *kinds: str) -> list[str]:
        """The events before the first token, e.g. `created`, `in_progress`."""
        return [self._write(self.response.lifecycle(kind)) for kind in kinds]

    def chunk(self, delta: Delta) -> str:
        """What one step added."""
        return self._join(self.response.take(delta))

    def completed(self) -> str:
        """The ends of the items; the response itself is `last`'s to tell."""
        return self._join(self._keep_last(self.response.end()))

    def failed(self, error: Exception) -> str:
        """The ends of the items, as far as they came."""
        return self._join(self._keep_last(self.response.fail(failure_of(self._told(error)))))

    def closing(self) -> str:
        """Nothing: the last event is no mark."""
        return ""

    def last(self) -> str:
        """The event that carries the whole response and ends the stream."""
        assert self._last is not None
        return self._write({**self._last, "response": self.response.whole()})

    def _keep_last(self, events: list[Event]) -> list[Event]:
        *before, self._last = events
        return before

    def _join(self, events: Sequence[Event]) -> str:
        return "".join(map(self._write, events))

    def _write(self, told: Event) -> str:
        numbered = {**told, "sequence_number": self._number}
        if self._obfuscate and "delta" in told:
            numbered["obfuscation"] = secrets.token_hex(_PADDED)[: _PADDED - len(told["delta"]) % _PADDED]
        self._number += 1
        return f"event: {told['type']}\n{event(numbered)}"
