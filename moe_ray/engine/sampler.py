"""Chooses the next token of every sequence in a batch at once, on the device of the logits.

Sampling is a pure function of (logits, parameters, seed, position): the noise is counter-based (a hash of seed and
position), never a generator's state. So a stream replayed elsewhere, in another batch, or after preemption draws the
very tokens it would have drawn. The noise is made on the host, so it is the same for every device.

What the sequences ask for is brought to the device in one copy that nothing waits for; the tokens and what is told of
them come back in one, the only thing that is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from moe_ray.core import Sequence, TokenLogprobs
from moe_ray.engine.adjustments import Adjustment, GrammarLimits, GrammarMasks, Row, adjustments
from moe_ray.engine.draws import Draws
from moe_ray.engine.host_copies import Readback, Upload
from moe_ray.engine.token_logprobs import PendingLogprobs

_MASK = (1 << 64) - 1
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of one step, in the order of the sequences."""

    token_ids: list[int]
    """`NO_TOKEN` where the masks and biases of a row allow none."""
    logprobs: list[TokenLogprobs | None]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on (seed, position) alone.

    SplitMix64 (Steele, Lea & Flood 2014), its counter advanced by `position`, finalised twice. A negative seed counts
    as its two's complement in 64 bits.
    """
    seed &= _MASK
    return (_mix(_mix((seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK) ^ seed) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Sampling:
    """One token for each row of a step's logits, and the log-probabilities that its sequence asks for, on their way."""

    def __init__(
        self,
        logits: torch.Tensor,
        sequences: Seq[Sequence],
        readback: Readback,
        eos_token_ids: frozenset[int] = frozenset(),
        drafts: Seq[Seq[int]] = (),
        masks: GrammarMasks | None = None,
        logprobs: bool = True,
    ) -> None:
        """Launch it. logits [S, V] float32, row i for sequences[i]; not modified.

        With `drafts`, row i is sampled as if drafts[i] were in the output of sequences[i] already (which may then stand
        in several rows): the same noise, penalties and masks that the row will meet should they come true.

        In order: penalties, logit_bias and masks, temperature, top_k, top_p, min_p, typical_p (transformers' order).
        `logprobs`: whether they are wanted where a sequence asks for them.
        """
        self._readback = readback
        rows = [Row(seq, draft) for seq, draft in zip(sequences, drafts or [()] * len(sequences), strict=True)]
        upload, vocab = Upload(), logits.shape[-1]
        adjusting: list[Adjustment] = adjustments(rows, eos_token_ids, vocab, upload)
        limits = None if masks is None else GrammarLimits(masks, upload)
        if limits is not None:
            adjusting.append(limits)
        random = [i for i, row in enumerate(rows) if not row.params.greedy]
        params = [rows[i].params for i in random]
        draws = None
        if random:
            noise = [uniform(rows[i].params.seed or 0, rows[i].position) for i in random]
            draws, drawn_rows = Draws(params, noise, vocab, upload), upload.ints(random)
        self._wanted = [i for i, row in enumerate(rows) if logprobs and row.params.logprobs is not None]
        wanted_rows = upload.ints(self._wanted) if self._wanted else None
        upload.send(logits.device)

        adjusted = logits.clone() if adjusting else logits
        for each in adjusting:
            each.apply(adjusted)
        chosen = adjusted.argmax(dim=-1)
        if draws is not None:
            at = drawn_rows.tensor
            chosen[at] = draws.draw(adjusted[at], reads_are_free(logits.device))
        if limits is not None:
            at = limits.rows.tensor
            chosen[at] = torch.where(adjusted[at].amax(dim=-1) == -torch.inf, NO_TOKEN, chosen[at])
        self._chosen, self._count = readback.add(chosen), len(rows)
        self._logprobs: PendingLogprobs | None = None
        if wanted_rows is not None:
            counts = [rows[i].params.logprobs or 0 for i in self._wanted]
            at = wanted_rows.tensor
            self._logprobs = PendingLogprobs(logits[at], chosen[at], counts, readback)

    def take(self) -> Sampled:
        """The outcome, once the readback was waited for."""
        told: list[TokenLogprobs | None] = [None] * self._count
        if self._logprobs is not None:
            for i, entry in zip(self._wanted, self._logprobs.take(), strict=True):
                told[i] = entry
        return Sampled(self._readback.array(self._chosen).tolist(), told)


def reads_are_free(device: torch.device) -> bool:
    """Whether values of a tensor can be read without waiting for what was queued before."""
    return device.type == "cpu"


def sample(
    logits: torch.Tensor,
    sequences: Seq[Sequence],
    eos_token_ids: frozenset[int] = frozenset(),
    drafts: Seq[Seq[int]] = (),
    masks: GrammarMasks | None = None,
    logprobs: bool = True,
) -> Sampled:
    """The outcome of `Sampling`, waited for."""
    readback = Readback(logits.device)
    sampling = Sampling(logits, sequences, readback, eos_token_ids, drafts, masks, logprobs)
    readback.wait()
    return sampling.take()
