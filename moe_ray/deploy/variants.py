"""The models that share the experts of one application, and which experts of theirs are equal. Loads no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from moe_ray.config import Config
from moe_ray.experts.sharing import ExpertNumbers, share
from moe_ray.hub import resolve_model
from moe_ray.model.checkpoint import Checkpoint, Progress
from moe_ray.model.expert_content import check_alike, contents_of

TRUNK_OF = "Trunk-{}"


@dataclass(frozen=True, slots=True)
class VariantModel:
    """A further model of an application."""

    name: str
    """By which clients ask for it."""
    config: Config
    """By which its trunks and its part of the gateway work."""
    numbers: ExpertNumbers
    """Of its experts at the replicas."""

    @property
    def trunk_name(self) -> str:
        """The name of the deployment of its trunks."""
        return TRUNK_OF.format(self.name)


def variants_of(config: Config, progress: Progress | None = None) -> tuple[VariantModel, ...]:
    """The variants of a configuration, compared with its model; () where it has none, and then nothing is read.

    `progress` is told of the bytes that have to be compared. Raises `CheckpointError`, and `ConfigError` naming a
    variant whose experts cannot be held beside the model's.
    """
    if not config.variants:
        return ()
    configs = config.for_variants
    checkpoints = open_all(config)
    try:
        contents = contents_of(checkpoints, config.cache_dir, progress)
        # An expert of another number is the same only where both actors hold it in the same bits.
        held = {key: config.experts.quantize_of(key[1]) for key in contents[0]}
        numbers = share([{key: (content, held[key]) for key, content in each.items()} for each in contents])
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()
    return tuple(
        VariantModel(variant.name, own, of_it)
        for variant, own, of_it in zip(config.variants, configs, numbers[1:], strict=True)
    )


def open_all(config: Config) -> list[Checkpoint]:
    """The checkpoints of the model and its variants, in order, which may share experts. Raises as `variants_of`."""
    checkpoints = [Checkpoint.open(resolve_model(each)) for each in (config, *config.for_variants)]
    for variant, checkpoint in zip(config.variants, checkpoints[1:], strict=True):
        base = checkpoints[0].config
        check_alike(base, checkpoint.config, variant.name, same_dtype=config.model.dtype == "auto")
    return checkpoints
