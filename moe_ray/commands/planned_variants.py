"""What the variants of a configuration add to the plan of its model: their trunks, and the experts that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from moe_ray.config import Config
from moe_ray.core import ExpertKey
from moe_ray.deploy.variants import open_all, variants_of
from moe_ray.experts.planning.footprint import weights_of_keys
from moe_ray.experts.sharing import added_keys, origin
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.formats import StoredWeight
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_expert, weights_of_model, weights_of_trunk


@dataclass(frozen=True, slots=True)
class VariantTrunk:
    """The model of one variant, whose trunk is an actor of its own."""

    name: str
    """Of the deployment."""
    model: ModelConfig
    quantised: Mapping[Weight, StoredWeight]
    """Of all its weights, experts too, by its own numbers."""
    bytes_to_read: int
    """By the trunk."""


@dataclass(frozen=True, slots=True)
class VariantParts:
    """What variants add. Without any: nothing."""

    added: frozenset[ExpertKey] = frozenset()
    """Keys by replicas' numbers of experts."""
    stored: Mapping[Weight, StoredWeight] = field(default_factory=dict)
    """The weights of these keys, by the same numbers."""
    trunks: tuple[VariantTrunk, ...] = ()

    def bytes_to_read(self, model: ModelConfig, keys: Iterable[ExpertKey]) -> int:
        """Of keys among `added`; `model` is the first one."""
        return sum(self.stored[weight].nbytes for weight in weights_of_keys(model, keys))

    @property
    def quantised(self) -> dict[Weight, StoredWeight]:
        """Of `stored`, those that keep their own bits."""
        return {weight: each for weight, each in self.stored.items() if each.grouping is not None}


def variant_parts(config: Config, progress: Callable[[int, int], None] | None = None) -> VariantParts:
    """Look up all weights of the variants, and compare their experts. Raises `CheckpointError`, `ConfigError`."""
    if not config.variants:
        return VariantParts()
    variants = variants_of(config, progress)
    checkpoints = open_all(config)
    num_experts = checkpoints[0].config.num_local_experts
    added = added_keys((variant.numbers for variant in variants), num_experts)
    stored: dict[Weight, StoredWeight] = {}
    for layer, number in added:
        model, expert = origin(number, num_experts)
        shape = checkpoints[model].config
        own, told = weights_of_expert(shape, layer, expert), weights_of_expert(shape, layer, number)
        stored.update({to: checkpoints[model].find(one) for one, to in zip(own, told, strict=True)})
    named = zip(variants, checkpoints[1:], strict=True)
    trunks = tuple(_trunk(variant.trunk_name, checkpoint) for variant, checkpoint in named)
    for checkpoint in checkpoints:
        checkpoint.close()
    return VariantParts(added, stored, trunks)


def _trunk(name: str, checkpoint: Checkpoint) -> VariantTrunk:
    check_surplus(checkpoint)
    model = config_of_trunk(checkpoint)
    found = {weight: checkpoint.find(weight) for weight in weights_of_model(model)}
    to_read = sum(found[weight].nbytes for weight in weights_of_trunk(model))
    return VariantTrunk(name, model, {w: each for w, each in found.items() if each.grouping is not None}, to_read)
