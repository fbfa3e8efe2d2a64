"""Log-probabilities of tokens from rows of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_ray.core import TokenLogprobs
from moe_ray.engine.host_copies import Readback


class PendingLogprobs:
    """Log-probabilities that are being computed."""

    def __init__(
        self, logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int], readback: Readback
    ) -> None:
        """Of token_ids[i] under row i of logits [R, V], of the counts[i] most likely ones, and its rank among all.

        A token below 0 is none.
        """
        self._counts, self._readback = counts, readback
        table = logits.log_softmax(-1)
        chosen = table.gather(1, token_ids.clamp(min=0)[:, None])
        values, ids = table.topk(max(1, *counts), dim=-1)
        ranks = (table > chosen).sum(-1) + 1
        self._at = [readback.add(each) for each in (token_ids, ranks, ids, chosen[:, 0], values)]

    def take(self) -> list[TokenLogprobs | None]:
        """One of each row, once the readback was waited for; None: of no token."""
        token_ids, ranks, ids, chosen, values = (self._readback.array(at) for at in self._at)
        found: list[TokenLogprobs | None] = []
        for i, count in enumerate(self._counts):
            top = tuple(zip(ids[i, :count].tolist(), values[i, :count].tolist(), strict=True))
            told = TokenLogprobs(int(token_ids[i]), float(chosen[i]), top, int(ranks[i]))
            found.append(told if token_ids[i] >= 0 else None)
        return found
