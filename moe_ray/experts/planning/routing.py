"""Which experts a step's tokens go to: draws of a layer's rows by expert, uniform or by recorded load. Pure data."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

DRAWS: Final = 24
"""Layers that are drawn: times are means over them. Always the same draws, so a plan is always the same."""
MANY: Final = 4096
"""Rows from which on nothing is drawn: each expert gets its mean."""

Rows = tuple[float, ...]
"""Of each expert in one layer."""


def rows_of_layers(
    num_experts: int, top_k: int, tokens: int, shares: Sequence[float] | None = None
) -> tuple[Rows, ...]:
    """Rows of each expert in some layers of a step of `tokens` tokens, each of which goes to `top_k` different experts.

    `shares`: how popular each expert is; None: all alike.

    >>> sum(rows_of_layers(8, 2, 5)[0])
    10.0
    """
    if tokens * top_k >= MANY:
        total = sum(shares) if shares else 0.0
        mean = [share / total for share in shares] if shares and total else [1 / num_experts] * num_experts
        return (tuple(tokens * min(1.0, top_k * each) for each in mean),)
    return _drawn(num_experts, top_k, tokens, None if shares is None else tuple(shares))


@lru_cache(maxsize=256)
def _drawn(num_experts: int, top_k: int, tokens: int, shares: tuple[float, ...] | None) -> tuple[Rows, ...]:
    draw, layers = random.Random(0), list[Rows]()
    for _ in range(DRAWS):
        rows = [0.0] * num_experts
        for _ in range(tokens):
            for expert in _choice(draw, num_experts, top_k, shares):
                rows[expert] += 1
        layers.append(tuple(rows))
    return tuple(layers)


def _choice(draw: random.Random, num_experts: int, top_k: int, shares: tuple[float, ...] | None) -> list[int]:
    """The experts of one token: drawn by their shares without putting back (Efraimidis and Spirakis 2006, A-Res)."""
    if shares is None:
        return draw.sample(range(num_experts), top_k)
    keys = [math.log(draw.random() or 1e-300) / share if share > 0 else -math.inf for share in shares]
    return sorted(range(num_experts), key=lambda expert: keys[expert])[-top_k:]
