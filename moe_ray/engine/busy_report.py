"""A line in the log every ten seconds while an engine computes, and a last one when it has fallen idle. No torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from moe_ray.core import EngineStats

logger = logging.getLogger(__name__)

EVERY_S: Final = 10.0


class BusyReport:
    """Decides when there is something to say, and says it. The engine's thread."""

    def __init__(self, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._since = self._due_at = clock()
        self._told = EngineStats()
        """What the last line was about."""
        self._busy = False
        """There was a step since a line said that nothing runs."""

    def due_in(self) -> float | None:
        """Seconds until `look` has something to say though no step is computed; None: nothing before the next step."""
        return max(0.0, self._due_at - self._clock()) if self._busy else None

    def look(self, read: Callable[[], EngineStats]) -> None:
        """Log a line if one is due; called after each step, and when `due_in` has passed. `read` is asked only then."""
        now = self._clock()
        if not self._busy:
            self._busy, self._since, self._due_at = True, now, now + self._every_s
            return
        if now < self._due_at:
            return
        stats = read()
        logger.info("%s", line(self._told, stats, now - self._since))
        self._busy = bool(stats.num_running or stats.num_waiting)  # else this was the last line until the next step
        self._told, self._since, self._due_at = stats, now, now + self._every_s


def line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """What happened in the last `seconds`, and how full the trunk is.

    >>> line(EngineStats(), EngineStats(2, 1, 100, 75, prompt_tokens=400, generated_tokens=50), 10)
    'prompt 40.0 tokens/s, generation 5.0 tokens/s, running 2, waiting 1, KV cache 25.0% used, prefix cache 0.0% hits'
    """
    seconds = max(seconds, 1e-9)
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generation = (now.generated_tokens - before.generated_tokens) / seconds
    used = 100 * (1 - now.kv_blocks_free / max(now.kv_blocks_total, 1))
    asked = now.prefix_query_tokens - before.prefix_query_tokens
    hits = 100 * (now.prefix_hit_tokens - before.prefix_hit_tokens) / max(asked, 1)
    text = f"prompt {prompt:.1f} tokens/s, generation {generation:.1f} tokens/s, "
    text += f"running {now.num_running}, waiting {now.num_waiting}, "
    text += f"KV cache {used:.1f}% used, prefix cache {hits:.1f}% hits"
    guessed = now.draft_tokens - before.draft_tokens
    if guessed:
        accepted = now.accepted_draft_tokens - before.accepted_draft_tokens
        text += f", {100 * accepted / guessed:.1f}% of drafts accepted"
    return text
