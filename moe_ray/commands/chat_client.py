"""The HTTP side of `moe-ray chat`: which model a server has, and its answer as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import httpx

from moe_ray.api.sse import SseReader
from moe_ray.commands.server_client import ServerClient, message_of
from moe_ray.errors import NotReady


@dataclass(frozen=True, slots=True)
class ServedCard:
    """A model that a server has."""

    name: str
    context: int | None = None
    """Most tokens of prompt and answer; None: the server does not say."""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the model recommends."""


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """One event of an answer's stream."""

    text: str = ""
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the answer so far."""


class ChatClient(ServerClient):
    """A server of OpenAI's chat API at one URL. Not thread-safe."""

    def models(self) -> list[ServedCard]:
        """The models of the server, at least one. Raises `NotReady` in one line when none answers."""
        try:
            cards = [_card(each) for each in self.model_entries()]
        except (ValueError, KeyError, TypeError):
            cards = []
        if not cards:
            raise NotReady(f"{self.url} names no model, as a server of OpenAI's API does")
        return cards

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]
    ) -> Iterator[AnswerPiece]:
        """Yield an answer as it comes. Raises `NotReady` with what the server or the connection says."""
        body = {"model": model, "messages": messages, **settings}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise NotReady(message_of(response.read(), response.status_code))
                yield from read_pieces(response.iter_bytes())
        except httpx.HTTPError as error:
            raise NotReady(str(error) or type(error).__name__) from None


def read_pieces(body: Iterable[bytes]) -> Iterator[AnswerPiece]:
    """The pieces of an answer in a response's body. Raises `NotReady` with an error that the server sends in it."""
    reader = SseReader()
    for data in chain.from_iterable(map(reader.feed, body)):
        if data != "[DONE]":
            yield _piece(data)


def _card(entry: Mapping[str, Any]) -> ServedCard:
    defaults = entry.get("sampling_defaults")
    context = entry.get("max_model_len")
    return ServedCard(
        str(entry["id"]),
        context if isinstance(context, int) else None,
        defaults if isinstance(defaults, dict) else {},
    )


def _piece(data: str) -> AnswerPiece:
    try:
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            raise NotReady(str(error["message"] if isinstance(error, dict) else error))
        choice = event["choices"][0] if event["choices"] else {}
        usage = event.get("usage")
        return AnswerPiece(
            (choice.get("delta") or {}).get("content") or "",
            choice.get("finish_reason"),
            (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotReady(f"an event that is none of OpenAI's chat API: {data[:200]!r}") from None
