"""What a checkpoint holds beside what its config.json asks for: a head of its own, biases, tensors of another model."""

from __future__ import annotations

import logging
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from typing import Final

from moe_ray.errors import CheckpointError
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.formats import FORMATS, Place
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.weights import head_weight, weights_of_model

logger = logging.getLogger(__name__)

NAMED: Final = 5
"""How many unused tensors a warning names."""


def config_of_trunk(checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint's config, untied where config.json ties a head to the embedding that differs from it.

    transformers loads such a checkpoint untied as well, with a warning: config.json says that the two are one matrix,
    and the file holds two. Reads both matrices; a process with experts only need not. Raises `CheckpointError`.
    """
    config = checkpoint.config
    head = head_weight(config)
    embed = Weight("embed", head.shape)
    if not config.tie_word_embeddings or not checkpoint.holds(head) or not checkpoint.holds(embed):
        return config
    if checkpoint.equal(embed, head):
        return config
    logger.warning(
        "%s: config.json has tie_word_embeddings, but %s is another matrix than %s: both are used, as transformers "
        "does; set tie_word_embeddings to false",
        *(checkpoint.directory, checkpoint.place(head).named("weight"), checkpoint.place(embed).named("weight")),
    )
    return replace(config, tie_word_embeddings=False)


def _further_layers(config: ModelConfig) -> tuple[str, ...]:
    """What the names of tensors begin with that belong to layers behind the last: `Family.further_layers`."""
    key = config.family.further_layers
    count = config.raw.get(key) if key is not None else None
    last = config.num_hidden_layers
    return tuple(f"model.layers.{layer}." for layer in range(last, last + count)) if isinstance(count, int) else ()


@cache
def _endings(place: Place) -> frozenset[str]:
    """What the names of a weight's tensors have after its stem, in any format: asked for once, not for each weight."""
    return frozenset(name for row in FORMATS.values() for name in row.names(place))


def check_surplus(checkpoint: Checkpoint) -> None:
    """Refuse biases that the model's family does not have, and warn of other tensors that nothing computes with.

    By their names; a bias is read, for AutoGPTQ writes zeros for models that have none. Raises `CheckpointError` for
    another: the model was trained with it.
    """
    config = checkpoint.config
    wanted = [*weights_of_model(config), head_weight(config)]
    places = [checkpoint.place(weight) for weight in wanted]
    plain = {place.named("weight") for place in places}  # what most checkpoints have, and nothing else
    others = [name for name in checkpoint.files if name not in plain]
    stems: dict[frozenset[str], set[str]] = {}
    for place in places if others else ():
        stems.setdefault(_endings(replace(place, stem="", index=0)), set()).add(place.stem)
    further = _further_layers(config)
    behind = [name for name in others if name.startswith(further)]
    if behind:
        logger.info(
            "%s: %d tensors of layers behind the last, which predict further tokens (%s), are not used",
            *(checkpoint.directory, len(behind), config.family.further_layers),
        )
    surplus = sorted(
        name
        for name in others
        if not name.startswith(further)
        and not any(
            name.endswith(ending) and name[: len(name) - len(ending)] in known
            for endings, known in stems.items()
            for ending in endings
        )
        and not any(fnmatch(name, pattern) for pattern in config.family.unused)
    )
    biases = [name for name in surplus if name.endswith("bias") and checkpoint.tensor(name).any()]
    if biases:
        raise CheckpointError(
            f"{checkpoint.directory / checkpoint.files[biases[0]]}: tensor {biases[0]}: a bias, and a "
            f"{config.family.model_type} model has none: it would be left out ({len(biases)} of them in all)"
        )
    surplus = [name for name in surplus if not name.endswith("bias")]
    if surplus:
        more = f" and {len(surplus) - NAMED} more" if len(surplus) > NAMED else ""
        logger.warning(
            "%s: these tensors are not used: %s%s; a %s model of this config.json has none of them",
            *(checkpoint.directory, ", ".join(surplus[:NAMED]), more, config.family.model_type),
        )
