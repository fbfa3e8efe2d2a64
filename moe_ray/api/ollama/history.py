"""Ollama's messages in the form that chat templates take, and prompts that go on from an answer's `context`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from moe_ray.api.ollama.schemas import OllamaMessage
from moe_ray.errors import InvalidRequest
from moe_ray.text.tokenizer import Tokenizer

_ANSWER: Final = "the answer before"
"""Stands for an answer whose tokens are known, where only what follows it is wanted."""


def template_messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """The conversation. Calls without an id get one, and results without one belong to the first call that waits."""
    turns: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # (id, name) of calls without a result
    num_calls = 0
    for number, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(f"messages[{number}].tool_calls: belong to the assistant", "messages")
        if message.tool_calls:
            turn["tool_calls"] = []
            for call in message.tool_calls:
                call_id = call.id or f"call_{num_calls}"
                num_calls += 1
                waiting.append((call_id, call.function.name))
                function = {"name": call.function.name, "arguments": call.function.arguments}
                turn["tool_calls"].append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool":
            call_id, name = _answered(message, waiting, f"messages[{number}]")
            waiting.remove((call_id, name))
            turn |= {"tool_call_id": call_id, "name": name}
        turns.append(turn)
    return turns


def going_on(context: Sequence[int], prompt: str, system: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation whose tokens so far are `context`, up to its last answer, and whose user says more.

    The system text stands in front of the prompt: it is too late for a turn of its own.
    """
    said = "\n\n".join(filter(None, (system, prompt)))
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": said},
    ]
    behind = tokenizer.render_chat(turns).partition(_ANSWER)[2]
    return [*context, *tokenizer.encode(behind, add_special_tokens=False)]


def _answered(message: OllamaMessage, waiting: Sequence[tuple[str, str]], where: str) -> tuple[str, str]:
    """The call that a message is the result of."""
    for call_id, name in waiting:
        if message.tool_call_id in (None, "", call_id) and message.tool_name in (None, "", name):
            return call_id, name
    raise InvalidRequest(f"{where}: no call of the assistant waits for this result", "messages")
