"""What changes logits before a token is chosen: penalties, biases and masks, each for the rows that ask for it.

An adjustment is made on the host, which puts its numbers into the step's upload, and applied on the logits' device.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moe_ray.core import SamplingParams, Sequence
from moe_ray.engine.host_copies import Upload
from moe_ray.engine.token_masks import forbidden, too_early


class Adjustment(Protocol):
    """Of some rows of a batch's logits."""

    def apply(self, logits: torch.Tensor) -> None:
        """Adjust logits [S, V], in place; does not wait for the device."""
        ...


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """Which tokens some rows of a batch's logits may become."""

    rows: list[int]
    bits: np.ndarray  # [len(rows), words] uint32, token i in bit i % 32 of word i // 32


@dataclass(frozen=True, slots=True)
class Row:
    """What a row of logits follows."""

    sequence: Sequence
    draft: Seq[int]
    """Tokens that count as output of the sequence, behind those it has."""

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.sampling

    @property
    def output(self) -> list[int]:
        return [*self.sequence.output_token_ids, *self.draft]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output."""
        return [*self.sequence.token_ids, *self.draft]

    @property
    def position(self) -> int:
        """Of the token that is chosen."""
        return len(self.sequence.token_ids) + len(self.draft)


def adjustments(rows: Seq[Row], eos_token_ids: frozenset[int], vocab: int, upload: Upload) -> list[Adjustment]:
    """Those that the rows' parameters ask for, in the order in which they are applied."""
    made: list[Adjustment] = []
    params = [row.params for row in rows]
    penalised = [
        i
        for i, p in enumerate(params)
        if p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    ]
    if penalised:
        made.append(_Penalties(penalised, [rows[i] for i in penalised], vocab, upload))
    biases = [(i, token, bias) for i, p in enumerate(params) for token, bias in p.logit_bias.items()]
    if biases:
        made.append(_Biases(biases, upload))
    allowed = [i for i, p in enumerate(params) if p.allowed_token_ids]
    if allowed:
        made.append(_Allowed(allowed, [params[i].allowed_token_ids for i in allowed], upload))
    masked: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if row.params.bad_words_ids or row.params.min_tokens:
            output = row.output
            tokens = forbidden(row.params, output) | too_early(row.params, output, eos_token_ids)
            masked += [(i, token) for token in tokens]
    if masked:
        made.append(_Forbidden(masked, upload))
    return made


class _Penalties:
    """repetition_penalty, frequency_penalty and presence_penalty."""

    def __init__(self, numbers: Seq[int], rows: Seq[Row], vocab: int, upload: Upload) -> None:
        self._vocab, self._count = vocab, len(rows)
        self._rows = upload.ints(numbers)
        self._seen = upload.array(_places([row.token_ids for row in rows], vocab))
        self._output = upload.array(_places([row.output for row in rows], vocab))
        self._repetition = upload.floats([row.params.repetition_penalty for row in rows])
        self._frequency = upload.floats([row.params.frequency_penalty for row in rows])
        self._presence = upload.floats([row.params.presence_penalty for row in rows])

    def apply(self, logits: torch.Tensor) -> None:
        repetition, frequency, presence = (
            each.tensor[:, None] for each in (self._repetition, self._frequency, self._presence)
        )
        seen, counts = self._counts(self._seen.tensor) > 0, self._counts(self._output.tensor)
        values = logits[self._rows.tensor]
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        values -= frequency * counts
        values -= presence * (counts > 0)
        logits[self._rows.tensor] = values

    def _counts(self, places: torch.Tensor) -> torch.Tensor:
        """How often each token stands in each row, [R, V] float32: whole numbers, so in any order of adding."""
        counts = torch.zeros(self._count * self._vocab, device=places.device)
        ones = torch.ones(places.shape, device=places.device)
        return counts.scatter_add_(0, places, ones).view(self._count, self._vocab)


def _places(token_ids: Seq[list[int]], vocab: int) -> np.ndarray:
    """Where each of the rows' tokens is in a table [R, V], flat."""
    rows = np.repeat(np.arange(len(token_ids), dtype=np.int64) * vocab, [len(ids) for ids in token_ids])
    return rows + np.fromiter((token for ids in token_ids for token in ids), np.int64, len(rows))


class _Biases:
    """logit_bias."""

    def __init__(self, biases: Seq[tuple[int, int, float]], upload: Upload) -> None:
        self._rows = upload.ints([row for row, _, _ in biases])
        self._tokens = upload.ints([token for _, token, _ in biases])
        self._values = upload.floats([bias for _, _, bias in biases])

    def apply(self, logits: torch.Tensor) -> None:
        places = (self._rows.tensor, self._tokens.tensor)
        logits[places] = logits[places] + self._values.tensor


class _Allowed:
    """allowed_token_ids."""

    def __init__(self, numbers: Seq[int], allowed: Seq[tuple[int, ...]], upload: Upload) -> None:
        self._rows = upload.ints(numbers)
        self._which = upload.ints([i for i, ids in enumerate(allowed) for _ in ids])
        self._tokens = upload.ints([token for ids in allowed for token in ids])

    def apply(self, logits: torch.Tensor) -> None:
        rows = self._rows.tensor
        others = torch.ones(len(rows), logits.shape[1], dtype=torch.bool, device=logits.device)
        others[self._which.tensor, self._tokens.tensor] = False
        logits[rows] = logits[rows].masked_fill(others, -torch.inf)


class _Forbidden:
    """Tokens that must not come next."""

    def __init__(self, places: Seq[tuple[int, int]], upload: Upload) -> None:
        self._rows = upload.ints([row for row, _ in places])
        self._tokens = upload.ints([token for _, token in places])

    def apply(self, logits: torch.Tensor) -> None:
        logits[self._rows.tensor, self._tokens.tensor] = -torch.inf


class GrammarLimits:
    """What grammars allow."""

    def __init__(self, masks: GrammarMasks, upload: Upload) -> None:
        self.rows = upload.ints(masks.rows)
        self._bits = upload.array(masks.bits.view(np.uint8))  # [R, bytes], little-endian

    def apply(self, logits: torch.Tensor) -> None:
        rows, packed = self.rows.tensor, self._bits.tensor
        places = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = ((packed[:, :, None] >> places) & 1).flatten(1)[:, : logits.shape[-1]]
        logits[rows] = logits[rows].masked_fill(allowed == 0, -torch.inf)
