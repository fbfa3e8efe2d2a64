"""Calibration: a text on its way through a model, layer by layer, and what each expert sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from moe_ray.model import moe
from moe_ray.model.compute.torch.expert import ACTIVATIONS
from moe_ray.model.compute.torch.trunk import LayerTensors
from moe_ray.model.layers import apply_rope, rms_norm, rope_table
from moe_ray.model.model_config import ModelConfig

WINDOW: Final = 512
"""Tokens that see each other."""
LEAST_DAMPING: Final = 0.01
"""The paper's."""
MOST_DAMPING: Final = 0.5
SAMPLED: Final = 128
"""Rows of an expert on which scales are compared."""
BORROWED: Final = 0.1
"""The most that another expert's token counts for an expert with too few of its own."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertInputs:
    """The rows that one expert is calibrated on."""

    rows: torch.Tensor  # [M, D]
    weights: torch.Tensor  # [M]: how much each counts
    own: int
    """How many were routed to it."""

    def damping(self, width: int) -> float:
        """GPTQ's damping for a weight with `width` inputs: the more, the fewer rows there are to tell them apart.

        On the demo model's layers (180 to 231 rows of an expert, other text to measure on) 0.5 lost less than 0.1, and
        that less than the paper's 0.01, with which w2 lost more than by plain rounding.
        """
        return min(MOST_DAMPING, max(LEAST_DAMPING, 0.1 * width / max(self.own, 1)))

    def hessian(self, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum of x x' [K, K] over rows, or over `inputs` [M, K] computed of them."""
        scaled = (self.rows if inputs is None else inputs) * self.weights.sqrt()[:, None]
        return scaled.T @ scaled

    def sample(self, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """About `SAMPLED` rows spread over all [M, K], each times the root of its weight."""
        step = max(1, len(self.rows) // SAMPLED)
        return (self.rows if inputs is None else inputs)[::step] * self.weights[::step].sqrt()[:, None]

    def power(self, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """The diagonal of the Hessian, [K]."""
        return self.weights @ (self.rows if inputs is None else inputs).square()

    def size(self, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted mean of |x| [K]."""
        found = (self.rows if inputs is None else inputs).abs()
        return (self.weights @ found) / self.weights.sum()


def expert_inputs(
    states: torch.Tensor,  # [T, D]
    chosen: torch.Tensor,  # [T, top k]
    weights: torch.Tensor,  # [T, top k]
    expert: int,
    enough: int,
) -> ExpertInputs:
    """What expert `expert` is calibrated on: the rows routed to it, each by the square of its routing weight.

    So much does an error of the expert count in the layer's output. One with fewer than `enough` rows of its own gets
    the layer's other rows as well, at a weight that falls from `BORROWED` to nothing as its own approach `enough`.
    """
    to_it = (chosen == expert).float() * weights.float().square()
    weight = to_it.sum(-1)  # [T]
    own = int((weight > 0).sum())
    if own < enough:
        typical = float(weights.float().square().mean())
        lent = BORROWED * (1 - own / enough) * typical
        weight = torch.where(weight > 0, weight, lent)
    which = weight.nonzero().flatten()
    return ExpertInputs(states[which], weight[which], own)


class CalibrationRun:
    """A text in windows on its way through the layers, in float32; one layer's weights are needed at a time."""

    def __init__(self, config: ModelConfig, windows: Sequence[Sequence[int]], embedding: torch.Tensor) -> None:
        self._config = config
        self._lengths = [len(window) for window in windows]
        self.hidden = embedding[torch.tensor([token for window in windows for token in window])].float()  # [T, D]
        table = rope_table(config, max(self._lengths), torch.float32, torch.device("cpu"))
        self._cos_sin = torch.cat([table[:length] for length in self._lengths])  # [T, 2, head_dim]

    def attention_inputs(self, weights: LayerTensors) -> torch.Tensor:
        """What q, k and v see: [T, D]."""
        return rms_norm(self.hidden, weights.input_norm, self._config.rms_norm_eps)

    def attended(self, states: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """What the output projection sees, [T, heads * head_dim]. Attention is causal within each window."""
        c = self._config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        joined = F.linear(states, qkv).view(len(states), heads + 2 * kv_heads, c.head_dim)
        rotated = apply_rope(joined[:, : heads + kv_heads], self._cos_sin)
        parts = (rotated[:, :heads], rotated[:, heads:], joined[:, heads + kv_heads :])
        mixed = []
        by_window = (torch.split_with_sizes(part.transpose(0, 1), self._lengths, 1) for part in parts)
        for window in zip(*by_window, strict=True):
            query, key, value = (part[None] for part in window)  # [1, heads, length, head_dim]
            mask = _band(query.shape[2], c.sliding_window)
            mixed.append(
                F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
                )[0]
            )
        return torch.cat(mixed, 1).transpose(0, 1).flatten(1)

    def add(self, rows: torch.Tensor) -> None:
        """Add what a part of the layer made, [T, D]."""
        self.hidden = self.hidden + rows

    def expert_states(self, post_norm: torch.Tensor) -> torch.Tensor:
        """What router and experts see: [T, D]."""
        return rms_norm(self.hidden, post_norm, self._config.rms_norm_eps)

    def route(self, states: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's experts and their weights, [T, top k] each."""
        return moe.route(states, gate, self._config.num_experts_per_tok, self._config.router)

    def inner(self, rows: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
        """What an expert's w2 sees: [M, I]."""
        return ACTIVATIONS[self._config.hidden_act](F.linear(rows, w1)) * F.linear(rows, w3)


def _band(length: int, window: int | None) -> torch.Tensor | None:
    """The mask of a sliding window, where it is shorter than the sequence."""
    if window is None or window >= length:
        return None
    every = torch.ones(length, length, dtype=torch.bool)
    return every.tril() & every.triu(1 - window)
