"""The sampler's arithmetic, reading tensors on the host wherever that is convenient: `Sampling` is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Sequence as Seq

import numpy as np
import torch

from moe_ray.core import SamplingParams, TokenLogprobs
from moe_ray.core import Sequence as TokenSequence
from moe_ray.engine.adjustments import GrammarMasks
from moe_ray.engine.draws import TOP_CANDIDATES
from moe_ray.engine.sampler import NO_TOKEN, Sampled, uniform


def sample(
    logits: torch.Tensor,
    sequences: Seq[TokenSequence],
    eos_token_ids: frozenset[int] = frozenset(),
    drafts: Seq[Seq[int]] = (),
    masks: GrammarMasks | None = None,
) -> Sampled:
    token_ids = choose(logits, sequences, eos_token_ids, drafts, masks)
    return Sampled(token_ids, _logprobs(logits, token_ids, [seq.request.sampling for seq in sequences]))


def choose(
    logits: torch.Tensor,
    sequences: Seq[TokenSequence],
    eos_token_ids: frozenset[int] = frozenset(),
    drafts: Seq[Seq[int]] = (),
    masks: GrammarMasks | None = None,
) -> list[int]:
    """Choose one token per row. logits [S, V] float32, row i for sequences[i]; not modified.

    With `drafts`, row i is sampled as if drafts[i] were in the output of sequences[i] already (which may then stand in
    several rows): the same noise, penalties and masks that the row will meet should they come true.

    In order: penalties, logit_bias and masks, temperature, top_k, top_p, min_p, typical_p (transformers' order).
    `NO_TOKEN` where the masks and biases of a row allow none.
    """
    params = [seq.request.sampling for seq in sequences]
    drafts = drafts or [()] * len(sequences)
    adjusted = _adjust(logits, sequences, drafts, params, eos_token_ids)
    if masks is not None:
        adjusted = _masked(adjusted.clone() if adjusted is logits else adjusted, masks)
    chosen = adjusted.argmax(dim=-1)
    random = [i for i, p in enumerate(params) if not p.greedy]
    if random:
        rows = torch.tensor(random, device=logits.device)
        noise = [uniform(params[i].seed or 0, len(sequences[i].token_ids) + len(drafts[i])) for i in random]
        chosen[rows] = _draw(adjusted[rows], [params[i] for i in random], noise)
    if masks is not None:
        rows = torch.tensor(masks.rows, device=logits.device)
        chosen[rows] = torch.where(adjusted[rows].amax(dim=-1) == -torch.inf, NO_TOKEN, chosen[rows])
    return chosen.tolist()


def _adjust(
    logits: torch.Tensor,
    sequences: Seq[TokenSequence],
    drafts: Seq[Seq[int]],
    params: list[SamplingParams],
    eos_token_ids: frozenset[int],
) -> torch.Tensor:
    """Return logits with penalties, biases and masks applied; the same tensor if no sequence asks for any."""
    penalised = [
        i
        for i, p in enumerate(params)
        if p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    ]
    biased = [i for i, p in enumerate(params) if p.logit_bias]
    masked = [i for i, p in enumerate(params) if sequences[i].num_output + len(drafts[i]) < p.min_tokens]
    restricted = [i for i, p in enumerate(params) if restricts(p)]
    if not (penalised or biased or masked or restricted):
        return logits
    out, device, vocab = logits.clone(), logits.device, logits.shape[-1]
    if penalised:
        rows = torch.tensor(penalised, device=device)
        picked = [params[i] for i in penalised]
        seen = _counts([[*sequences[i].token_ids, *drafts[i]] for i in penalised], vocab, device) > 0
        counts = _counts([[*sequences[i].output_token_ids, *drafts[i]] for i in penalised], vocab, device)
        repetition = _column([p.repetition_penalty for p in picked], device)
        values = out[rows]
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        values -= _column([p.frequency_penalty for p in picked], device) * counts
        values -= _column([p.presence_penalty for p in picked], device) * (counts > 0)
        out[rows] = values
    for i in biased:
        ids = torch.tensor(list(params[i].logit_bias), device=device)
        out[i, ids] += torch.tensor(list(params[i].logit_bias.values()), device=device, dtype=out.dtype)
    for i in restricted:
        mask_tokens(out[i], params[i], [*sequences[i].output_token_ids, *drafts[i]])
    for i in masked:
        stops = {*params[i].stop_token_ids, *(() if params[i].ignore_eos else eos_token_ids)}
        if params[i].allowed_token_ids and stops.issuperset(params[i].allowed_token_ids):
            continue  # nothing would be left
        out[i, torch.tensor(list(stops), dtype=torch.long, device=device)] = -torch.inf
    return out


def _masked(logits: torch.Tensor, masks: GrammarMasks) -> torch.Tensor:
    """Set what `masks` do not allow to -inf, in place; returns logits [S, V]."""
    rows = torch.tensor(masks.rows, device=logits.device)
    packed = torch.from_numpy(masks.bits.view(np.uint8)).to(logits.device)  # [R, bytes], little-endian
    places = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> places) & 1).flatten(1)[:, : logits.shape[-1]]
    logits[rows] = logits[rows].masked_fill(allowed == 0, -torch.inf)
    return logits


def _counts(token_ids: list[list[int]], vocab: int, device: torch.device) -> torch.Tensor:
    """How often each token stands in each list, [R, V] float32."""
    longest = max(map(len, token_ids), default=0)
    # Padding goes to an extra column that is cut off.
    padded = torch.tensor([ids + [vocab] * (longest - len(ids)) for ids in token_ids], dtype=torch.long, device=device)
    counts = torch.zeros((len(token_ids), vocab + 1), device=device)
    return counts.scatter_add_(1, padded, torch.ones_like(padded, dtype=counts.dtype))[:, :vocab]


def _draw(logits: torch.Tensor, params: list[SamplingParams], noise: list[float]) -> torch.Tensor:
    """Draw one token per row by inverting its (truncated) distribution at `noise`. logits [R, V]; returns [R].

    Each row takes the path that it would take alone: the order in which a distribution is inverted decides the token.
    """
    device, vocab = logits.device, logits.shape[-1]
    logits = logits / _column([p.temperature for p in params], device)
    chosen = torch.empty(len(params), dtype=torch.long, device=device)
    cut = [p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 or p.typical_p < 1.0 for p in params]
    left = [i for i, is_cut in enumerate(cut) if not is_cut]
    if left:
        rows = torch.tensor(left, device=device)
        chosen[rows] = _invert(logits[rows].softmax(-1), [noise[i] for i in left])
    left = [i for i, is_cut in enumerate(cut) if is_cut]
    for size in sorted({min(TOP_CANDIDATES, vocab), vocab}):
        if not left:
            break
        rows = torch.tensor(left, device=device)
        ids, weights, enough = _truncate(logits[rows], [params[i] for i in left], size)
        drawn = _invert(weights, [noise[i] for i in left])
        chosen[rows[enough]] = ids.gather(1, drawn[:, None])[:, 0][enough]
        left = rows[~enough].tolist()
    return chosen


def _truncate(
    logits: torch.Tensor, params: list[SamplingParams], size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply top_k, top_p, min_p and typical_p to the `size` most likely tokens of each row of logits [R, V].

    Returns their ids, most likely first and equals by id [R, size], their weights, 0 where cut off [R, size], and
    whether tokens beyond `size` are certain to be cut off [R].
    """
    device, vocab = logits.device, logits.shape[-1]
    top_k = torch.tensor([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], device=device)[:, None]
    top_p = _column([p.top_p for p in params], device)
    min_p = _column([p.min_p for p in params], device)
    log_total = logits.logsumexp(-1, keepdim=True)
    # Equal logits are common in bfloat16, and topk leaves their order open: ascending ids, then a stable sort, fix it.
    ids = logits.topk(size, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids, probabilities = ids.gather(1, order), (values - log_total).exp()
    keep = torch.arange(size, device=device)[None] < top_k
    # top_p counts the mass that top_k left; a token stays if the mass before it has not reached p.
    mass = torch.where(keep, probabilities, 0.0)
    total = torch.where(top_k < vocab, mass.sum(-1, keepdim=True), 1.0)
    keep &= (mass.cumsum(-1) - mass < top_p * total) | (top_p >= 1.0)
    keep &= probabilities >= min_p * probabilities[:, :1]
    keep[:, 0] = True  # also with top_p 0
    # A top_k beyond `size` needs all its tokens for `total`; without top_k the last one looked at must be cut off.
    enough = (top_k <= size) | ((top_k == vocab) & ~keep[:, -1:])
    weights = torch.where(keep, probabilities, 0.0)
    typical = [i for i, p in enumerate(params) if p.typical_p < 1.0]
    if typical:
        rows = torch.tensor(typical, device=device)
        weights[rows] = _typical(weights[rows], _column([params[i].typical_p for i in typical], device))
    return ids, weights, enough[:, 0]


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


def _invert(weights: torch.Tensor, noise: list[float]) -> torch.Tensor:
    """Index at which each row's cumulative weight passes noise * total. weights [R, N] non-negative; returns [R]."""
    cumulative = weights.double().cumsum(-1)
    target = _column(noise, weights.device).double() * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may put the target on the total itself: then the last token with any weight is meant.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).float().argmax(-1)
    return torch.minimum(index, last)


def _logprobs(logits: torch.Tensor, token_ids: list[int], params: list[SamplingParams]) -> list[TokenLogprobs | None]:
    out: list[TokenLogprobs | None] = [None] * len(params)
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    if wanted:
        rows = logits[torch.tensor(wanted, device=logits.device)]
        counts = [params[i].logprobs or 0 for i in wanted]
        for i, entry in zip(wanted, token_logprobs(rows, [token_ids[i] for i in wanted], counts), strict=True):
            out[i] = entry
    return out


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def restricts(params: SamplingParams) -> bool:
    """Whether a sequence has masks of this file."""
    return bool(params.allowed_token_ids or params.bad_words_ids)


def mask_tokens(row: torch.Tensor, params: SamplingParams, output: Sequence[int]) -> None:
    """Mask, in place, what may not follow `output` in one row of logits [V].

    Forbidden words that would leave nothing of the allowed tokens are not masked.
    """
    if params.allowed_token_ids:
        kept = torch.tensor(params.allowed_token_ids, dtype=torch.long, device=row.device)
        values = row[kept]
        row.fill_(-torch.inf)
        row[kept] = values
    forbidden = _forbidden(params.bad_words_ids, output)
    if params.allowed_token_ids and forbidden.issuperset(params.allowed_token_ids):
        return
    row[torch.tensor(list(forbidden), dtype=torch.long, device=row.device)] = -torch.inf


def _forbidden(words: Sequence[tuple[int, ...]], output: Sequence[int]) -> set[int]:
    """The last token of each word whose other tokens end `output`."""
    return {word[-1] for word in words if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]}


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of token_ids[i] under row i of logits [R, V], of the counts[i] most likely ones, and its rank among all."""
    if not token_ids:
        return []
    table = logits.log_softmax(-1)
    chosen = table.gather(1, torch.tensor([token_ids], device=logits.device).T)
    ranks = (table > chosen).sum(-1) + 1
    values, ids = table.topk(max(1, *counts), dim=-1)
    found = []
    for i, (token, logprob, rank) in enumerate(zip(token_ids, chosen[:, 0].tolist(), ranks.tolist(), strict=True)):
        top = tuple(zip(ids[i, : counts[i]].tolist(), values[i, : counts[i]].tolist(), strict=True))
        found.append(TokenLogprobs(token, logprob, top, rank))
    return found
