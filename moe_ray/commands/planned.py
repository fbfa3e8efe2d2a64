"""A model pulled apart by a configuration: what each actor holds, and what it reads from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ray.config import Config
from moe_ray.experts.planning.footprint import DraftPlan, Plan, WeightsHeld, make_plan, weights_of_keys
from moe_ray.experts.planning.placement import Holding, holdings
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.foreign import INDEX, PICKLES
from moe_ray.model.formats import StoredWeight
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_trunk

GIB, MIB = 2**30, 2**20
GB = 10**9


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what each actor will read from the checkpoint (empty when only config.json is there)."""

    model_name: str
    directory: Path
    """Of the checkpoint, or its config.json where there is no more."""
    model: ModelConfig
    plan: Plan
    bytes_to_read: dict[str, int]
    held: WeightsHeld
    experts_per_actor: int = 1

    @property
    def unseen_quantization(self) -> str | None:
        """How the weights are quantised by config.json, where they are not here to be looked at: planned as if not."""
        unseen = self.model.quantization if not self.bytes_to_read else None
        return None if unseen is None else unseen.method


def planned(config: Config, directory: Path, without_weights: bool = False, cards: bool = False) -> Planned:
    """Plan the model of `directory`, checking every tensor's header. Raises `CheckpointError`, `ConfigError`.

    `without_weights`: a directory with no more than its config.json will do, or that file itself. Experts inside the
    trunk (`transport: local`) are planned one by one. `cards`: the actors compute on cards, not on this machine's CPU,
    so the dtype is the checkpoint's unless one is configured.
    """
    from moe_ray.model.compute.resolve import choose_dtype
    from moe_ray.native import build

    alone = directory.suffix == ".json" and directory.is_file()
    model = ModelConfig.read(directory) if alone else ModelConfig.load(directory)
    layers, experts = model.num_hidden_layers, model.num_local_experts
    config = config.model_copy(update={"experts": config.experts.grouped(experts)})
    spares, per_actor = config.experts.spare_keys(layers, experts), config.experts.group_size
    if config.transport == "local":
        spares, per_actor = (), 1
    placed = holdings(layers, experts, per_actor, spares)
    found = _Found({}, {})
    weights = any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", INDEX, *PICKLES))
    if weights or not without_weights:
        checkpoint = Checkpoint.open(directory)
        check_surplus(checkpoint)
        model = config_of_trunk(checkpoint)
        found = _checked(checkpoint, model, placed)
        checkpoint.close()
    device = "cuda" if cards or config.model.device == "cuda" else "cpu"
    dtype = choose_dtype(config.model.dtype, model.dtype, device, build.cpu_flags(), build.kernels_here())
    held = weights_held(config, dtype, experts, found.quantised)
    draft = _draft(
        config,
        directory,
        model,
        without_weights,
        lambda own: choose_dtype(config.model.dtype, own, device, build.cpu_flags(), build.kernels_here()),
    )
    plan = make_plan(model, dtype, placed, held, config.engine.kv_cache_dtype, draft)
    return Planned(config.served_name, directory, model, plan, found.bytes_to_read, held, per_actor)


def _draft(
    config: Config, directory: Path, target: ModelConfig, without_weights: bool, dtype_of: Callable[[str], str]
) -> DraftPlan | None:
    """What the draft model takes; None where there is none. Raises `ConfigError` where its vocabulary is another."""
    from moe_ray.engine.build_draft import check_vocab_size
    from moe_ray.hub import resolve_draft
    from moe_ray.text.same_vocabulary import check_same_vocabulary

    found = resolve_draft(config, config_only=without_weights)
    if found is None:
        return None
    model = ModelConfig.read(found) if found.is_file() else ModelConfig.load(found)
    check_vocab_size(model, target, str(config.engine.draft_model))
    if found.is_dir() and directory.is_dir():
        check_same_vocabulary(found, directory)
    engine = config.engine
    return DraftPlan.of(model, dtype_of(model.dtype), engine.draft_quantize, engine.kv_cache_dtype)


def weights_held(
    config: Config, dtype: str, num_experts: int, quantised: Mapping[Weight, StoredWeight] | None = None
) -> WeightsHeld:
    """What the configuration says the weights are held as; those that come `quantised` keep their own bits."""
    experts = {expert: HeldAs(dtype, config.experts.quantize_of(expert)) for expert in range(num_experts)}
    spares = tuple(HeldAs(dtype, spare.quantize) for spare in config.experts.spares)
    return WeightsHeld(HeldAs(dtype, config.trunk.quantize), experts, quantised or {}, spares)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a checkpoint holds of the actors."""

    bytes_to_read: dict[str, int]
    quantised: dict[Weight, StoredWeight]


def _checked(checkpoint: Checkpoint, model: ModelConfig, placed: Sequence[Holding]) -> _Found:
    """Look every tensor up. Raises `CheckpointError` naming file and tensor."""
    found = _Found({}, {})
    actors = {"Trunk": tuple(weights_of_trunk(model)), **{one.name: weights_of_keys(model, one.keys) for one in placed}}
    for name, weights in actors.items():
        stored = {weight: checkpoint.find(weight) for weight in weights}
        found.bytes_to_read[name] = sum(each.nbytes for each in stored.values())
        found.quantised.update({weight: each for weight, each in stored.items() if each.grouping is not None})
    return found


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
