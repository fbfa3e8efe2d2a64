"""What of a model a step reads and computes: weights and bytes of each part, without regard to a device. Pure data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moe_ray.experts.planning.footprint import WeightsHeld
from moe_ray.model.families import Weight
from moe_ray.model.formats import dtype_bytes
from moe_ray.model.kv_bytes import held_in, kv_bytes_per_token
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import head_weight, weights_of_expert, weights_of_trunk


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices that are multiplied one after the other, all held alike."""

    form: str
    weights: int
    nbytes: int


NOTHING: Final = Matrices("float32", 0, 0)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """One layer of a model, its head, and what an actor holds of it."""

    layers: int
    """All of them, `dense_layers` with them."""
    num_experts: int
    top_k: int
    attention: Matrices
    """Of one layer with experts: q, k, v, out; and of a shared expert, which every token goes to."""
    router: Matrices
    expert: Matrices
    """One expert of one layer."""
    head: Matrices
    query_width: int
    """Heads of queries times their size."""
    head_dim: int
    kv_bytes_per_token: int
    """Over all layers."""
    row_bytes: int
    trunk_bytes: int
    """All that a trunk holds."""
    expert_bytes: int
    """One expert over all layers that have experts."""
    window: int | None = None
    """Tokens that one attends to at most, in all layers but `full_layers`."""
    full_layers: int = 0
    """How many layers have no such window."""
    dense_layers: int = 0
    """How many have no experts (DeepSeek's first): all of such a layer is the trunk's, and no call leaves it."""
    dense: Matrices = NOTHING
    """Of one of these: attention, and the network that every token goes through."""

    @property
    def mixture_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers

    @staticmethod
    def of(model: ModelConfig, dtype: str, held: WeightsHeld, kv_cache_dtype: str = "auto") -> ModelCost:
        """Count `model` with rows in `dtype`, its weights as `held` says."""
        trunk = list(weights_of_trunk(model))
        some = model.mixture_layers[0]
        matrices = [weight for weight in trunk if len(weight.shape) > 1]
        layer = [weight for weight in matrices if weight.layer == some]
        without = min(model.dense_layers, default=None)
        dense = [] if without is None else [weight for weight in matrices if weight.layer == without]
        routers = [weight for weight in layer if weight.role == "router"]
        expert = weights_of_expert(model, some, 0)
        cache = held_in(kv_cache_dtype, dtype)
        return ModelCost(
            model.num_hidden_layers,
            model.num_local_experts,
            model.num_experts_per_tok,
            _together([weight for weight in layer if weight.role != "router"], held),
            _together(routers, held),
            _together(expert, held),
            _together([head_weight(model)], held),
            model.num_attention_heads * model.head_dim,
            model.head_dim,
            kv_bytes_per_token(model, cache),
            model.hidden_size * dtype_bytes(dtype),
            sum(map(held.nbytes, trunk)),
            len(model.mixture_layers) * sum(map(held.nbytes, expert)),
            model.sliding_window,
            len(model.full_layers),
            len(model.dense_layers),
            _together(dense, held),
        )

    def seen(self, context: float) -> float:
        """Tokens of a context that one attends to, on average over the layers."""
        if self.window is None:
            return context
        return context + (min(context, self.window) - context) * (self.layers - self.full_layers) / self.layers


def _together(weights: Iterable[Weight], held: WeightsHeld) -> Matrices:
    found = list(weights)
    form = _form(max(found, key=lambda weight: weight.numel), held) if found else "float32"
    return Matrices(form, sum(weight.numel for weight in found), sum(map(held.nbytes, found)))


def _form(weight: Weight, held: WeightsHeld) -> str:
    """What kernels compute on: a float dtype, int8, int4 or nf4; of a quantised checkpoint, by its bits."""
    stored = held.as_stored(weight)
    if stored is None or stored.grouping is None:
        return held.held_as(weight)
    return "int8" if stored.grouping.bits == 8 else "nf4" if stored.grouping.levels else "int4"
