"""Anthropic's answers, whole or as server-sent events, from what the one choice of a job has become."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from moe_ray.api.anthropic.errors import error_body
from moe_ray.api.failure import failure_of
from moe_ray.api.output import Delta, JobOutput
from moe_ray.api.sse import event
from moe_ray.text.answers.parts import CallArguments, CallBegun, Part, Text

PING = event({"type": "ping"}, "ping")


class MessageRenderer:
    """The answer to one request."""

    def __init__(self, output: JobOutput, *, model: str, max_tokens: int, request_id: str) -> None:
        """`max_tokens` is what the request asks for, which may be more than the context holds."""
        self._output = output
        self._choice = output.choices[0]
        self._model = model
        self._max_tokens = max_tokens
        self._request_id = request_id
        self._started = False
        self._open = ""
        """Type of the block that is being told; "" for none."""
        self._index = -1
        """Of that block."""

    def whole(self) -> dict[str, Any]:
        """The answer, once it is finished."""
        answer = self._choice.answer
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.content}] if answer.content else []
        content += [
            # What `max_tokens` has cut is what the clients of a stream make of it: the members that were complete.
            {**_call(call.call_id, call.name), "input": from_json(call.arguments or "{}", allow_partial=True)}
            for call in answer.calls
        ]
        return {**self._message(content), **self._ending(), "usage": self._usage()}

    def chunk(self, delta: Delta) -> str:
        """What one step added; begins with the message, and ends it with its last step."""
        told = [] if self._started else [self._start()]
        for part in delta.parts:
            told += self._part(part)
        if delta.finish_reason is not None:
            told += self._stop_block()
            ending = {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
            told += [event(ending, "message_delta"), event({"type": "message_stop"}, "message_stop")]
        return "".join(told)

    def completed(self) -> str:
        """Nothing: the last chunk says that the message stops."""
        return ""

    def failed(self, error: Exception) -> str:
        """The body of an error response, as an event."""
        return event(error_body(failure_of(error), self._request_id), "error")

    def closing(self) -> str:
        """Nothing."""
        return ""

    def _start(self) -> str:
        self._started = True
        nothing = {"stop_reason": None, "stop_sequence": None}
        usage = {**self._usage(), "output_tokens": 0}
        message = {**self._message([]), **nothing, "usage": usage}
        return event({"type": "message_start", "message": message}, "message_start")

    def _part(self, part: Part) -> list[str]:
        match part:
            case Text(""):
                return []
            case Text(text):
                opening = [] if self._open == "text" else self._start_block({"type": "text", "text": ""})
                return [*opening, self._delta({"type": "text_delta", "text": text})]
            case CallBegun(_, call_id, name):
                return self._start_block({**_call(call_id, name), "input": {}})
            case CallArguments(_, json):
                return [self._delta({"type": "input_json_delta", "partial_json": json})]

    def _start_block(self, block: dict[str, Any]) -> list[str]:
        before = self._stop_block()
        self._index += 1
        self._open = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*before, event(start, "content_block_start"), *([] if self._index else [PING])]

    def _delta(self, delta: dict[str, Any]) -> str:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    def _stop_block(self) -> list[str]:
        if not self._open:
            return []
        self._open = ""
        return [event({"type": "content_block_stop", "index": self._index}, "content_block_stop")]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._output.job.job_id, "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content}

    def _ending(self) -> dict[str, Any]:
        choice = self._choice
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        if choice.finish_reason != "length":
            reason = "tool_use" if choice.answer.calls else "end_turn"
        elif choice.num_tokens < self._max_tokens:
            reason = "model_context_window_exceeded"
        else:
            reason = "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        usage = self._output.usage()
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _call(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name}
