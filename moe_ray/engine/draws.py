"""Draws tokens from logits: temperature and truncation, and inversion of what is left at a given noise."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Final

import torch

from moe_ray.core import SamplingParams
from moe_ray.engine.host_copies import Upload

TOP_CANDIDATES: Final = 1024
"""Truncation looks at this many most likely tokens first and at the whole vocabulary only where they do not suffice."""


class Draws:
    """Draws of some rows of logits. Each row takes the path that it would take alone.

    The order in which a distribution is inverted decides the token.
    """

    def __init__(self, params: Seq[SamplingParams], noise: Seq[float], vocab: int, upload: Upload) -> None:
        self._vocab, self._count = vocab, len(params)
        self._temperatures, self._noise = upload.floats([p.temperature for p in params]), upload.floats(noise)
        cut = [p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 or p.typical_p < 1.0 for p in params]
        whole = [i for i, is_cut in enumerate(cut) if not is_cut]
        some = [i for i, is_cut in enumerate(cut) if is_cut]
        top_k = [min(params[i].top_k, vocab) if params[i].top_k > 0 else vocab for i in some]
        self._num_whole, self._num_cut = len(whole), len(some)
        self._whole, self._cut = upload.ints(whole), upload.ints(some)
        self._top_k, self._top_p = upload.ints(top_k), upload.floats([params[i].top_p for i in some])
        self._min_p = upload.floats([params[i].min_p for i in some])
        self._typical_p = upload.floats([params[i].typical_p for i in some])
        self._is_typical = any(params[i].typical_p < 1.0 for i in some)
        self._unsure = [i for i, k in enumerate(top_k) if k > TOP_CANDIDATES]
        """Of the cut rows those for which the likeliest candidates may not suffice."""
        self._unsure_rows = upload.ints(self._unsure)

    def draw(self, logits: torch.Tensor, reads: bool) -> torch.Tensor:
        """One token for each row of logits [R, V]; returns [R].

        `reads`: values may be read on the host, and so the whole vocabulary is looked at for those rows alone that need
        it. Else for all that may, without waiting for the device; the tokens are the same.
        """
        logits = logits / self._temperatures.tensor[:, None]
        drawn = torch.empty(self._count, dtype=torch.long, device=logits.device)
        if self._num_whole:
            rows = self._whole.tensor
            drawn[rows] = _invert(logits[rows].softmax(-1), self._noise.tensor[rows])
        if self._num_cut:
            drawn[self._cut.tensor] = self._draw_cut(logits[self._cut.tensor], reads)
        return drawn

    def _draw_cut(self, logits: torch.Tensor, reads: bool) -> torch.Tensor:
        every = torch.arange(len(logits), device=logits.device)
        drawn, enough = self._drawn(logits, every, min(TOP_CANDIDATES, self._vocab))
        if self._vocab <= TOP_CANDIDATES or not self._unsure:
            return drawn
        rows = self._unsure_rows.tensor
        if reads:
            rows = rows[~enough[rows]]
            if not len(rows):
                return drawn
        again, _ = self._drawn(logits[rows], rows, self._vocab)
        drawn[rows] = torch.where(enough[rows], drawn[rows], again)
        return drawn

    def _drawn(self, logits: torch.Tensor, rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the `size` most likely tokens of each row of logits [R, V], which are `rows` of those that are cut.

        Returns tokens [R], and whether tokens beyond `size` are certain to be cut off [R].
        """
        top_k, top_p, min_p = (each.tensor[rows][:, None] for each in (self._top_k, self._top_p, self._min_p))
        ids, weights, enough = _truncate(logits, top_k, top_p, min_p, size)
        if self._is_typical:
            p = self._typical_p.tensor[rows][:, None]
            weights = torch.where(p < 1.0, _typical(weights, p), weights)
        noise = self._noise.tensor[self._cut.tensor[rows]]
        return ids.gather(1, _invert(weights, noise)[:, None])[:, 0], enough


def _truncate(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply top_k, top_p and min_p [R, 1] to the `size` most likely tokens of each row of logits [R, V].

    Returns their ids, most likely first and equals by id [R, size], their weights, 0 where cut off [R, size], and
    whether tokens beyond `size` are certain to be cut off [R].
    """
    vocab = logits.shape[-1]
    log_total = logits.logsumexp(-1, keepdim=True)
    # Equal logits are common in bfloat16, and topk leaves their order open: ascending ids, then a stable sort, fix it.
    if size < vocab:
        ids = logits.topk(size, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
    else:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = (values - log_total).exp()
    keep = torch.arange(size, device=logits.device)[None] < top_k
    # top_p counts the mass that top_k left; a token stays if the mass before it has not reached p.
    mass = torch.where(keep, probabilities, 0.0)
    total = torch.where(top_k < vocab, mass.sum(-1, keepdim=True), 1.0)
    keep &= (mass.cumsum(-1) - mass < top_p * total) | (top_p >= 1.0)
    keep &= probabilities >= min_p * probabilities[:, :1]
    keep[:, 0] = True  # also with top_p 0
    # A top_k beyond `size` needs all its tokens for `total`; without top_k the last one looked at must be cut off.
    enough = (top_k <= size) | ((top_k == vocab) & ~keep[:, -1:])
    return ids, torch.where(keep, probabilities, 0.0), enough[:, 0]


def _typical(weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of tokens closest to the expected information whose probability reaches p [R, 1].

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666): token x comes in the order of
    |-log q(x) - H(q)|, q being the weights [R, N] normalised and H their entropy.
    """
    q = weights / weights.sum(-1, keepdim=True)
    information = -q.log()  # infinite where the weight is 0: those come last
    entropy = torch.special.entr(q).sum(-1, keepdim=True)
    order = (information - entropy).abs().argsort(dim=-1, stable=True)
    sorted_q = q.gather(1, order)
    kept = sorted_q.cumsum(-1) - sorted_q < p
    return torch.where(torch.zeros_like(kept).scatter_(1, order, kept), weights, 0.0)


def _invert(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index at which each row's cumulative weight passes noise * total. weights [R, N] non-negative, noise [R]."""
    cumulative = weights.double().cumsum(-1)
    target = noise[:, None].double() * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may put the target on the total itself: then the last token with any weight is meant.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).float().argmax(-1)
    return torch.minimum(index, last)
