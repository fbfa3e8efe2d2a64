"""What a model needs, per actor, before anything is started: bytes of weights, KV cache, what fits."""

from __future__ import annotations

from dataclasses import dataclass

from moe_ray.model.checkpoint import expert_specs, trunk_specs
from moe_ray.model.model_config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """One actor: what it holds."""

    name: str
    parameters: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole model, pulled apart."""

    dtype: str
    actors: tuple[ActorPlan, ...]
    """The trunk first, then the experts in order."""
    kv_bytes_per_token: int
    context: int
    """Tokens of one sequence at the model's full context length."""

    @property
    def total_bytes(self) -> int:
        return sum(actor.weight_bytes for actor in self.actors)

    def fits(self, card_bytes: int, reserve: float = 0.1) -> list[tuple[ActorPlan, bool, int]]:
        """(actor, whether its weights fit a card of `card_bytes`, KV tokens that remain for it) for each actor.

        `reserve` is the share of the card kept for activations and the runtime. Experts hold no KV cache.
        """
        usable = int(card_bytes * (1 - reserve))
        rows = []
        for actor in self.actors:
            left = usable - actor.weight_bytes
            tokens = max(0, left) // self.kv_bytes_per_token if actor is self.actors[0] else 0
            rows.append((actor, left >= 0 and (actor is not self.actors[0] or tokens > 0), tokens))
        return rows


def make_plan(model: ModelConfig, dtype: str) -> Plan:
    """Plan `model` in `dtype`: one trunk, one actor per expert over all layers."""
    size = DTYPE_BYTES[dtype]
    trunk = sum(spec.numel for spec in trunk_specs(model))
    expert = sum(spec.numel for layer in range(model.num_hidden_layers) for spec in expert_specs(model, layer, 0))
    actors = [ActorPlan("Trunk", trunk, trunk * size)]
    actors += [ActorPlan(f"Expert{e}", expert, expert * size) for e in range(model.num_local_experts)]
    return Plan(dtype, tuple(actors), model.kv_elements_per_token * size, model.max_position_embeddings)
