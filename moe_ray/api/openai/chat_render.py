"""Responses of the chat completions API: messages with text and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_ray.api.openai.render import Likely, OpenAIRenderer, Told, finite
from moe_ray.api.openai.schemas import Body, ChatFields
from moe_ray.api.output import ChoiceOutput, Delta
from moe_ray.api.sse import dumps
from moe_ray.text.answers.parts import CallArguments, CallBegun, Part, Text, ToolCall


class ChatRenderer(OpenAIRenderer):
    """Responses of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    nothing = '"delta":{}'
    calls_reason = "tool_calls"
    """The finish reason of an answer that ended with calls."""

    @classmethod
    def for_body(cls, body: Body) -> type[OpenAIRenderer]:
        """A request that gives `functions`, the old form of `tools`, is answered in the old form."""
        return FunctionRenderer if isinstance(body, ChatFields) and body.functions else cls

    def _message(self, text: str, choice: ChoiceOutput) -> dict[str, Any]:
        answer = choice.answer
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message |= {"content": answer.content or None, **self._calls(answer.calls)}
        return {"message": message}

    def _deltas(self, delta: Delta, text: str) -> list[str]:
        return [f'"delta":{dumps(self._delta(part))}' for part in delta.parts]

    def _reason(self, choice: ChoiceOutput) -> str | None:
        called = bool(choice.answer.calls) and choice.finish_reason == "stop"
        return self.calls_reason if called else choice.finish_reason

    def _calls(self, calls: Sequence[ToolCall]) -> dict[str, Any]:
        """What a whole message says of its calls."""
        return {
            "tool_calls": [
                {"id": each.call_id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
                for each in calls
            ]
        }

    def _delta(self, part: Part) -> dict[str, Any]:
        """A part of an answer as a chunk says it."""
        match part:
            case Text(text):
                return {"content": text}
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallArguments(index, json):
                return {"tool_calls": [{"index": index, "function": {"arguments": json}}]}

    def whole(self) -> dict[str, Any]:
        """See `OpenAIRenderer.whole`."""
        return {**super().whole(), **self._of_prompt(self._output.choices[0])}

    def _opening(self, told: Told, choice: ChoiceOutput, usage: str) -> str:
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        ids = self._of_prompt(choice)
        return f"{told.head}{delta}{',' + dumps(ids)[1:-1] if ids else ''}{usage}}}\n\n"

    def _logprobs(self, told: Told, logprobs: Sequence[Likely]) -> dict[str, Any]:
        content = [
            {**self._entry(at.token_id, at.logprob), "top_logprobs": [self._entry(*top) for top in at.top]}
            for _, at in logprobs
            if at is not None
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token_id)
        token = self._spelled(token_id) or spelled.decode("utf-8", "replace")
        return {"token": token, "logprob": finite(logprob), "bytes": list(spelled)}


class FunctionRenderer(ChatRenderer):
    """The same for clients of before tools: one call, as `function_call`."""

    calls_reason = "function_call"

    def _calls(self, calls: Sequence[ToolCall]) -> dict[str, Any]:
        return {"function_call": {"name": calls[0].name, "arguments": calls[0].arguments}}

    def _delta(self, part: Part) -> dict[str, Any]:
        match part:
            case Text(text):
                return {"content": text}
            case CallBegun(_, _, name):
                return {"function_call": {"name": name, "arguments": ""}}
            case CallArguments(_, json):
                return {"function_call": {"arguments": json}}
