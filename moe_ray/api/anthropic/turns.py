"""Anthropic's turns of blocks as messages of the form that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from moe_ray.api.anthropic.schemas import MessageTurn, TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock
from moe_ray.errors import InvalidRequest

BILLING_LINE: Final = "x-anthropic-billing-header:"
"""A coding agent begins its system text with a block for Anthropic's accounts that differs from request to request.
With it, no prefix would ever be found in the cache."""
_Blocks = list[tuple[str, Any]]  # where each stands, and the block


def template_messages(system: Sequence[TextBlock], turns: Sequence[MessageTurn]) -> list[dict[str, Any]]:
    """The whole conversation. Raises `InvalidRequest` naming the block that is out of place."""
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    texts = [*system, *(block for turn in turns[:first] for block in turn.content if isinstance(block, TextBlock))]
    said = [block.text for block in texts if block.text and not block.text.startswith(BILLING_LINE)]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "\n\n".join(said)}] if said else []
    waiting: dict[str, str] = {}  # id of each call of the turn before → name of its tool
    for role, blocks in _joined(turns, first):
        if role == "assistant":
            messages.append(_assistant(blocks))
            waiting = {call["id"]: call["function"]["name"] for call in messages[-1].get("tool_calls", ())}
        else:
            messages += _user(blocks, waiting)
            waiting = {}
    return messages


def _joined(turns: Sequence[MessageTurn], start: int) -> list[tuple[str, _Blocks]]:
    """The turns from `start` on, those of one side in a row as one."""
    joined: list[tuple[str, _Blocks]] = []
    for number, turn in enumerate(turns[start:], start):
        role = "assistant" if turn.role == "assistant" else "user"
        blocks = [(f"messages.{number}.content.{i}", block) for i, block in enumerate(turn.content)]
        if joined and joined[-1][0] == role:
            joined[-1][1].extend(blocks)
        else:
            joined.append((role, blocks))
    return joined


def _assistant(blocks: _Blocks) -> dict[str, Any]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for where, block in blocks:
        match block:
            case TextBlock(text=text):
                texts.append(text)
            case ToolUseBlock(id=call_id, name=name, input=arguments):
                if any(call["id"] == call_id for call in calls):
                    raise InvalidRequest(
                        f"{where}.id: another `tool_use` block of this turn has {call_id!r}", "messages"
                    )
                calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
            case ThinkingBlock():
                pass
            case _:
                raise _misplaced(where, block, "user")
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(filter(None, texts))}
    return {**message, "tool_calls": calls} if calls else message


def _user(blocks: _Blocks, waiting: dict[str, str]) -> list[dict[str, Any]]:
    """Results of the calls that wait for them, each a message of its own, and what the user says."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    left = dict(waiting)
    for where, block in blocks:
        match block:
            case TextBlock(text=text):
                texts.append(text)
            case ToolResultBlock(tool_use_id=call_id):
                if call_id not in left:
                    wrong = f"no `tool_use` block of the turn before waits for a result of {call_id!r}"
                    raise InvalidRequest(f"{where}.tool_use_id: {wrong}", "messages")
                messages.append(
                    {"role": "tool", "tool_call_id": call_id, "name": left.pop(call_id), "content": _result(block)}
                )
            case _:
                raise _misplaced(where, block, "assistant")
    if left:
        turn = blocks[0][0].rpartition(".content.")[0] if blocks else "messages"
        missing = ", ".join(map(repr, left))
        raise InvalidRequest(f"{turn}: without a `tool_result` block for the calls {missing}", "messages")
    if texts or not messages:
        messages.append({"role": "user", "content": "\n".join(filter(None, texts))})
    return messages


def _result(block: ToolResultBlock) -> str:
    text = "\n".join(part.text for part in block.content)
    return f"Error: {text}" if block.is_error else text


def _misplaced(where: str, block: Any, role: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: a `{block.type}` block belongs into a turn of the {role}", "messages")
