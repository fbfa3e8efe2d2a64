"""The operations that a trunk is made of, as an interface, and the reference: each by plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F

from moe_ray.core import Batch
from moe_ray.model import moe
from moe_ray.model.compute.base import FFN, HeldMatrix, KVCacheView, LayerCache
from moe_ray.model.compute.torch.attention import attend
from moe_ray.model.compute.torch.expert import TorchFFN
from moe_ray.model.compute.torch.plan import MOST_RECORDED, StepPlan, plan_step
from moe_ray.model.layers import apply_rope, normalise, rms_norm
from moe_ray.model.matrix import Matrix
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.trunk_weights import TrunkWeights


@dataclass(frozen=True, slots=True)
class Attending:
    """How one layer attends."""

    scale: float | None
    """Of products of queries and keys; None: head_dim ** -0.5."""
    window: int | None = None
    """Positions that a query sees, its own included; None: all up to its own."""
    sinks: torch.Tensor | None = None  # [heads] logits that count in the softmax of each head, and have no value


class StepAttention(Protocol):
    """One batch's inputs and attention. A padded batch has P tokens, of which the first T count."""

    @property
    def num_tokens(self) -> int:
        """T."""
        ...

    @property
    def token_ids(self) -> torch.Tensor:
        """[P]"""
        ...

    @property
    def positions(self) -> torch.Tensor:
        """[P]"""
        ...

    @property
    def real(self) -> torch.Tensor | None:
        """[1] int64, T: what is recorded reads it from the device, and fits any T up to P. None: T is P."""
        ...

    @property
    def key(self) -> tuple[object, ...] | None:
        """What is fixed in the launches of this step: steps of equal keys differ in the contents of tensors alone.

        None: no other step is like it.
        """
        ...

    def take(self, other: Self) -> None:
        """Fill this step's tensors with those of another one of its key."""
        ...

    def attend(
        self, qk: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, cache: LayerCache, how: Attending
    ) -> torch.Tensor:
        """Rotate queries and keys, keep keys and values in the cache, and return what is attended to.

        qk [P, heads + kv_heads, head_dim], v [P, kv_heads, head_dim], cos_sin [P, 2, head_dim]; the result is
        [P, heads, head_dim].
        """
        ...

    def attend_latents(self, q: torch.Tensor, k: torch.Tensor, cache: LayerCache, how: Attending) -> torch.Tensor:
        """The same, [P, heads, width], of rotated queries [P, heads, width] and keys [P, 1, width], also the values."""
        ...


class TrunkOps(Protocol):
    """What a backend computes of a trunk's pass, for one model. Nothing in it waits for the device."""

    def plan(self, batch: Batch, cache: KVCacheView, static_shapes: bool) -> StepAttention:
        """What attention needs to know of a batch. `static_shapes`: pad decodes (see `plan.py`)."""
        ...

    def hold(self, rows: Sequence[Matrix], weights: TrunkWeights) -> HeldMatrix:
        """Read matrices that may be quantised, one above the other, for `linear`. Raises `CheckpointError`."""
        ...

    def hold_shared(self, matrices: Sequence[Matrix], weights: TrunkWeights) -> FFN:
        """Read gate, up and down of an expert that all tokens go to. Raises `CheckpointError`."""
        ...

    def linear(self, x: torch.Tensor, weight: HeldMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [P, K] times weight [N, K], transposed, plus bias [N]: [P, N]."""
        ...

    def add_normalise(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [P, D] with what a part of the layer made, [P, D], added to them; and these normalised."""
        ...

    def normalise_heads(self, qk: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        """Queries and keys [P, heads + kv_heads, head_dim], normalised head by head; weights [head_dim] each."""
        ...

    def route(
        self, rows: torch.Tensor, logits: torch.Tensor, correction: torch.Tensor | None, real: torch.Tensor | None
    ) -> moe.Routed:
        """Rows [P, D] on their way to the experts that their logits [P, E] choose; see `moe.choose` and `moe.group`.

        Those from `real` on (see `StepAttention.real`) choose no expert: they are in no count, and come last.
        """
        ...

    def combine(
        self, hidden: torch.Tensor, rows: torch.Tensor, row_of: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [P, D] with what experts made of the first `real` added to them, as `route` put them.

        rows [R, D], row_of [N, K], of which R is T * K at least, and N is T or P.
        """
        ...


def add(config: ModelConfig, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Hidden states [P, D] with what a part of a layer made, [P, D], added to them."""
    return hidden + rows * config.residual_multiplier


class TorchStep:
    """`StepAttention` by torch."""

    def __init__(self, plan: StepPlan, config: ModelConfig) -> None:
        self._plan, self._config = plan, config
        self.num_tokens, self.token_ids, self.positions = plan.num_tokens, plan.token_ids, plan.positions
        self.real = plan.real if plan.padded else None

    @property
    def key(self) -> tuple[object, ...] | None:
        plan = self._plan
        return plan.shapes if plan.padded and not plan.chunks and len(plan.positions) <= MOST_RECORDED else None

    def take(self, other: Self) -> None:
        for mine, theirs in zip(self._plan.tensors(), other._plan.tensors(), strict=True):
            mine.copy_(theirs)

    def attend(
        self, qk: torch.Tensor, v: torch.Tensor, cos_sin: torch.Tensor, cache: LayerCache, how: Attending
    ) -> torch.Tensor:
        heads, rotated = self._config.num_attention_heads, apply_rope(qk, cos_sin)
        return self._attend(rotated[:, :heads], rotated[:, heads:], v, cache, how)

    def attend_latents(self, q: torch.Tensor, k: torch.Tensor, cache: LayerCache, how: Attending) -> torch.Tensor:
        return self._attend(q, k, k, cache, how)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, how: Attending
    ) -> torch.Tensor:
        return attend(self._plan, q, k, v, cache, how.scale, how.sinks, full=how.window is None)


class TorchOps:
    """`TrunkOps` by torch: any family and dtype, on any device."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def plan(self, batch: Batch, cache: KVCacheView, static_shapes: bool) -> StepAttention:
        c = self._config
        return TorchStep(plan_step(batch, cache, c.sliding_window, self._device, static_shapes), c)

    def hold(self, rows: Sequence[Matrix], weights: TrunkWeights) -> HeldMatrix:
        return weights.tensor(*rows)

    def hold_shared(self, matrices: Sequence[Matrix], weights: TrunkWeights) -> FFN:
        gate, up, down = map(weights.tensor, matrices)
        return TorchFFN(gate, up, down, self._config.hidden_act)

    def linear(self, x: torch.Tensor, weight: HeldMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(weight, torch.Tensor), "held by another backend"
        return F.linear(x, weight, bias)

    def add_normalise(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if added is not None:
            hidden = add(self._config, hidden, added)
        return hidden, normalise(self._config, hidden, weight, bias)

    def normalise_heads(self, qk: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        heads, eps = self._config.num_attention_heads, self._config.rms_norm_eps
        return torch.cat([rms_norm(qk[:, :heads], q_norm, eps), rms_norm(qk[:, heads:], k_norm, eps)], 1)

    def route(
        self, rows: torch.Tensor, logits: torch.Tensor, correction: torch.Tensor | None, real: torch.Tensor | None
    ) -> moe.Routed:
        c = self._config
        chosen, weights = moe.choose(logits, c.num_experts_per_tok, c.router, correction)
        if real is not None:
            chosen = without_padding(chosen, real, c.num_local_experts)
        return moe.group(rows, chosen, weights, c.num_local_experts)

    def combine(
        self, hidden: torch.Tensor, rows: torch.Tensor, row_of: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        padding = len(hidden) - len(row_of)
        made = moe.combine(rows, F.pad(row_of, (0, 0, 0, padding)) if padding else row_of)
        if real is not None:
            made = made.masked_fill(is_padding(made, real), 0.0)
        return add(self._config, hidden, made)


def is_padding(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """bool [P, 1]: which of rows [P, ...] come behind the first `real` [1]."""
    return (torch.arange(len(rows), device=rows.device) >= real)[:, None]


def without_padding(chosen: torch.Tensor, real: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The experts of tokens [P, K], for those behind the first `real` [1] a number that no expert has: the next one."""
    return chosen.masked_fill(is_padding(chosen, real), num_experts)
