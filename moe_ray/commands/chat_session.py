"""The state of one `moe-ray chat`: its conversation and settings, and how a question is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from moe_ray.commands.chat_client import ChatClient, ServedCard
from moe_ray.commands.chat_screen import answer_screen
from moe_ray.commands.chat_settings import SamplingSettings
from moe_ray.commands.conversation import Conversation
from moe_ray.errors import ConfigError, NotReady

STOPPED = "stopped"
"""The finish reason of an answer that Ctrl-C ended."""


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """How one answer came."""

    ttft_s: float | None
    """Seconds to the first text; None: there was none."""
    total_s: float
    tokens: int
    counted: bool
    """By the server; else pieces of the stream are counted."""
    prompt_tokens: int | None
    finish_reason: str | None

    @property
    def tokens_per_s(self) -> float | None:
        """Behind the first one; None where that cannot be said."""
        if self.ttft_s is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.total_s - self.ttft_s, 1e-6)

    def __str__(self) -> str:
        what = "tokens" if self.counted else "pieces"
        parts = [f"{self.tokens} {what}"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} {what}/s")
        if self.ttft_s is not None:
            parts.append(f"first after {self.ttft_s:.2f} s")
        if self.finish_reason not in (None, "stop"):
            parts.append("cut at max_tokens" if self.finish_reason == "length" else str(self.finish_reason))
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What came of a question."""

    text: str
    stats: AnswerStats


class ChatSession:
    """One user's conversation with one server."""

    def __init__(
        self,
        client: ChatClient,
        cards: Sequence[ServedCard],
        model: str | None,
        settings: Callable[[ServedCard], SamplingSettings],
        conversation: Conversation,
        output: Console,
        messages: Console,
        markdown: bool,
    ) -> None:
        """Answers go to `output`, all else to `messages`. Raises what `settings` raises."""
        self.client = client
        self.cards = {card.name: card for card in cards}
        self.model = model or cards[0].name
        self.settings = settings(self.card)
        self.conversation = conversation
        self.messages = messages
        self.last: AnswerStats | None = None
        self.read_more: Callable[[], list[str]] | None = None
        """Reads lines up to a line `/end`; None where input is not typed."""
        self.failed = False
        """A question had no answer."""
        self._output = output
        self._markdown = markdown
        self._unanswered: str | None = None

    @property
    def card(self) -> ServedCard:
        """Of the model that is asked; of a name that the server does not list, the name alone."""
        return self.cards.get(self.model) or ServedCard(self.model)

    def choose(self, name: str) -> None:
        """Ask another model from now on. Raises `ConfigError` naming the models of the server."""
        if name not in self.cards:
            raise ConfigError(f"no model {name!r} at {self.client.url}; there are {', '.join(self.cards)}")
        self.model = name
        self.settings = SamplingSettings(self.settings.chosen, self.card.sampling_defaults)

    def ask(self, question: str) -> None:
        """Show the answer and keep both; a fault is told, ends only this answer, and takes the question back."""
        self._unanswered = None
        try:
            answer = self._answer(question)
        except NotReady as error:
            self.messages.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
            self.failed, self._unanswered = True, question
            return
        self.last = answer.stats
        if self.messages.is_terminal:
            self.messages.print(f"[dim]{answer.stats}[/]", soft_wrap=True)
        if answer.text:
            self.conversation = self.conversation.with_turn(question, answer.text)
        else:
            self._unanswered = question

    def retry(self) -> None:
        """Ask the last question again, in place of its answer. Raises `ConfigError` where there is none."""
        question = self._unanswered
        if question is None:
            question = self.undo()
        self.ask(question)

    def undo(self) -> str:
        """Forget the last question and its answer; returns the question. Raises `ConfigError` where there is none."""
        if not self.conversation.turns:
            raise ConfigError("nothing was said yet")
        question = self.conversation.turns[-1].question
        self.conversation = self.conversation.without_last()
        return question

    def _answer(self, question: str) -> ChatAnswer:
        pieces: list[str] = []
        started = time.perf_counter()
        first: float | None = None
        usage: tuple[int, int] | None = None
        reason: str | None = None
        with answer_screen(self._output, self._markdown) as write:
            try:
                for piece in self.client.stream(self.model, self.conversation.messages(question), self.settings.body):
                    if piece.text:
                        first = first or time.perf_counter() - started
                        pieces.append(piece.text)
                        write(piece.text)
                    usage, reason = piece.usage or usage, piece.finish_reason or reason
            except KeyboardInterrupt:
                reason = STOPPED
        stats = AnswerStats(
            first,
            time.perf_counter() - started,
            usage[1] if usage else len(pieces),
            usage is not None,
            usage[0] if usage else None,
            reason,
        )
        return ChatAnswer("".join(pieces), stats)
