"""What one choice of a response has become, from the token events of its sequence. No ray, no network."""

from __future__ import annotations

import base64
import codecs
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_ray.core import Request, TokenEvent, TokenLogprobs
from moe_ray.engine.routed_experts import RoutedRows
from moe_ray.text.detokenizer import IncrementalDetokenizer


@dataclass(slots=True, eq=False)
class Choice:
    """What one choice has become so far."""

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer
    head: str
    """A chunk's JSON up to and including the choice's index."""
    echo: str = ""
    started: bool = False
    ended: bool = False
    """Its engine request is over, or was stopped."""
    num_tokens: int = 0
    num_cached: int = 0
    degraded: list[int] = field(default_factory=list)
    """Positions that were computed without one of their experts."""
    known: RoutedRows = field(default_factory=RoutedRows)
    """The experts of its positions, where it asks for them."""
    routed_told: int = 0
    """Positions whose experts were in a chunk."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    offset: int = 0
    """Characters of text before the next token, for `text_offset`."""
    characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def take(self, event: TokenEvent) -> tuple[str, Sequence[TokenLogprobs]]:
        """Account for one engine step; return the text that is now certain and the logprobs of its tokens."""
        params = self.request.sampling
        token_ids = event.token_ids
        self.num_cached = max(self.num_cached, event.num_cached_tokens)
        self.degraded += event.degraded_positions
        if event.routed_experts is not None:
            self.known.take(event.routed_experts)
        self.ended = event.last
        if event.stop_token_id is not None and not params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        text, used = "", 0
        while used < len(token_ids) and self.detokenizer.stopped_on is None:
            text += self.detokenizer.push([token_ids[used]])
            used += 1
        # Tokens that came in one step with the end of a stop string, but after it, are no part of the answer.
        self.num_tokens += len(event.token_ids) if self.detokenizer.stopped_on is None else used
        if event.finish_reason is not None:
            text += self.detokenizer.finish()
            self.finish_reason = event.finish_reason
            if event.stop_token_id in params.stop_token_ids:
                self.stop_reason = event.stop_token_id
        if self.detokenizer.stopped_on is not None:
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stopped_on
        if not self.started and self.echo:
            text = self.echo + text
        return text, event.logprobs[:used]

    def routed(self, since_last: bool = False) -> dict[str, Any]:
        """The response's fields on the experts of each computed position; none where they are not asked for.

        `routed_experts` is [positions, num_hidden_layers, num_experts_per_tok] as vLLM writes it: base64 of a .npy
        file. Position i is token i of prompt and output; the last token of the output is not computed. With
        `since_last` (a chunk): the positions that no chunk before had, from `routed_experts_start` on, if there are
        any.
        """
        if not self.request.sampling.return_routed_experts:
            return {}
        # The engine may have computed tokens behind the end of a stop string: no part of the answer.
        end = min(len(self.request.prompt_token_ids) + self.num_tokens - 1, self.known.count)
        if not since_last:
            return {"routed_experts": _npy(self.known.rows(0, end))}
        start = self.routed_told
        if end <= start:
            return {}
        self.routed_told = end
        return {"routed_experts_start": start, "routed_experts": _npy(self.known.rows(start, end))}


def _npy(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")
