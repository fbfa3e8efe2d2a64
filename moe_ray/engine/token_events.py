"""What a step tells of one sequence."""

from __future__ import annotations

from moe_ray.core import Batch, TokenEvent, TokenLogprobs
from moe_ray.engine import routed_experts as routing
from moe_ray.engine.grammar.state import why_stuck
from moe_ray.engine.sampler import Sampled
from moe_ray.engine.scheduler import Outcome


def token_event(
    outcome: Outcome, batch: Batch, sampled: Sampled, row: int, told: tuple[TokenLogprobs, ...]
) -> TokenEvent:
    """The event of an outcome whose first token was sampled in `row`; what it tells is noted as told.

    `told`: log-probabilities of the sequence's prompt that this step brought.
    """
    seq, tokens = outcome.seq, outcome.token_ids
    event = TokenEvent(
        request_id=seq.request.request_id,
        token_ids=tokens,
        logprobs=tuple(entry for entry in sampled.logprobs[row : row + len(tokens)] if entry is not None),
        finish_reason=outcome.finish_reason,
        stop_token_id=outcome.stop_token_id,
        num_cached_tokens=seq.num_cached_prompt,
        queue_s=(seq.times.queue_s or 0.0) if seq.num_output == len(tokens) else 0.0,
        degraded_positions=tuple(seq.degraded[seq.degraded_told :]),
        routed_experts=routing.tell(seq, batch),
        prompt_logprobs=told,
        prompt_logprobs_start=seq.num_scored + 1 - len(told),
        error=why_stuck(seq) if outcome.stuck else None,
    )
    seq.degraded_told = len(seq.degraded)
    return event
