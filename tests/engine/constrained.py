"""An engine over a small readable model, stepped to the end of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from stepping import events_of

from moe_ray.core import EngineStats, Request, SamplingParams, TokenEvent
from moe_ray.engine.engine import Engine
from moe_ray.engine.engine_options import EngineOptions
from moe_ray.engine.grammar.grammars import Grammars
from moe_ray.engine.scheduler import SchedulerLimits
from moe_ray.model.trunk import Trunk
from moe_ray.sampling import Grammar
from moe_ray.text.tokenizer import Tokenizer

EOS: Final = 2


@dataclass(frozen=True)
class Answer:
    """All that came of one request."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_token_id: int | None
    error: Exception | None


@dataclass(frozen=True)
class Rig:
    trunk: Trunk
    tokenizer: Tokenizer
    grammars: Grammars

    def engine(self, blocks: int = 256, **limits: Any) -> Engine:
        options = EngineOptions(blocks, 8, SchedulerLimits(**limits), 200, 1, frozenset({EOS}))
        return Engine(self.trunk, options, self.grammars)

    def answers(self, requests: Sequence[Request], **options: Any) -> tuple[dict[str, Answer], EngineStats]:
        """Run the requests to their end, all bookkeeping looked at after each step."""
        engine = self.engine(**options)
        events = events_of(engine, requests)
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        assert not engine.has_work
        return {name: self._joined(own) for name, own in events.items()}, stats

    def answer(self, request: Request, **options: Any) -> Answer:
        return self.answers([request], **options)[0][request.request_id]

    def _joined(self, events: list[TokenEvent]) -> Answer:
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
        tokens = tuple(token for event in events for token in event.token_ids)
        last = events[-1]
        shown = tokens[:-1] if last.stop_token_id is not None else tokens
        return Answer(tokens, self.tokenizer.decode(shown, False), last.finish_reason, last.stop_token_id, last.error)

    @property
    def blanks(self) -> dict[int, float]:
        """A bias against the blanks that a random model loves."""
        return {i: -100.0 for i in range(512) if set(self.tokenizer.token_bytes(i)) & set(b" \t\r\n")}


def ask(
    grammar: Grammar | None,
    name: str = "r",
    prompt: tuple[int, ...] = (30, 31, 32),
    output: tuple[int, ...] = (),
    **sampling: Any,
) -> Request:
    return Request(
        name, prompt, SamplingParams(**{"max_tokens": 120, "seed": 1, "grammar": grammar, **sampling}), output
    )
