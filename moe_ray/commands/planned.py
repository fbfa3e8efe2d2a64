"""A model pulled apart by a configuration: what each actor holds, and what it reads from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moe_ray.commands.planned_variants import VariantParts, variant_parts
from moe_ray.config import Config
from moe_ray.experts.planning.footprint import DraftPlan, Plan, WeightsHeld, make_plan, weights_of_keys
from moe_ray.experts.planning.placement import Holding, holdings, with_variants
from moe_ray.model.checkpoint import Checkpoint
from moe_ray.model.families import Weight
from moe_ray.model.foreign import INDEX, PICKLES
from moe_ray.model.formats import StoredWeight
from moe_ray.model.formats.held import HeldAs
from moe_ray.model.implied import implied_formats
from moe_ray.model.model_config import ModelConfig
from moe_ray.model.surplus import check_surplus, config_of_trunk
from moe_ray.model.weights import weights_of_trunk

GIB, MIB = 2**30, 2**20
GB = 10**9


@dataclass(frozen=True, slots=True)
class SharedExperts:
    """Bytes of weights of several models on the same experts, and of each of them on experts of its own."""

    total_bytes: int
    """Of all together, spares not counted."""
    alone_bytes: int
    """Of the first model alone."""
    trunk_bytes: int
    """Of the variants' trunks."""
    separate_bytes: int
    """Of all models, each with experts of its own."""

    @property
    def added_expert_bytes(self) -> int:
        """Of the variants' experts that no earlier model has."""
        return self.total_bytes - self.alone_bytes - self.trunk_bytes

    @property
    def shared_bytes(self) -> int:
        """Of experts that are held once, and would be held again by each model alone."""
        return self.separate_bytes - self.total_bytes


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
    shared: SharedExperts | None = None
    """None: there are no variants."""

    @property
    def unseen_quantization(self) -> str | None:
        """How the weights are quantised by config.json, where they are not here to be looked at: planned as if not."""
        unseen = self.model.quantization if not self.bytes_to_read and not self.held.stored else None
        return None if unseen is None else unseen.method


def planned(
    config: Config,
    directory: Path,
    without_weights: bool = False,
    cards: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Planned:
    """Plan the model of `directory`, checking every tensor's header. Raises `CheckpointError`, `ConfigError`.

    `without_weights`: a directory with no more than its config.json will do, or that file itself. Experts inside the
    trunk (`transport: local`) are planned one by one. `cards`: the actors compute on cards, not on this machine's CPU,
    so the dtype is the checkpoint's unless one is configured. `progress` is told of the bytes by which the experts of
    variants are compared.
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
    parts = variant_parts(config, progress)
    by_base = holdings(layers, experts, per_actor, spares)
    placed = with_variants(by_base, parts.added, experts)
    found = _Found({}, implied_formats(model))
    weights = any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.gguf", INDEX, *PICKLES))
    if weights or not without_weights:
        checkpoint = Checkpoint.open(directory)
        check_surplus(checkpoint)
        model = config_of_trunk(checkpoint)
        found = _checked(checkpoint, model, placed, parts)
        checkpoint.close()
    device = "cuda" if cards or "cuda" in (config.model.device, config.trunk.device, config.experts.device) else "cpu"
    dtype = choose_dtype(config.model.dtype, model.dtype, device, build.cpu_flags(), build.kernels_here())
    by_triton = config.model.kernels == "triton" or (device == "cuda" and config.model.kernels == "auto")
    kept = partial(WeightsHeld.kept, by_triton=by_triton)
    held = weights_held(config, dtype, experts, kept(found.quantised), 1 + len(parts.trunks))
    draft = _draft(
        config,
        directory,
        model,
        without_weights,
        lambda own: choose_dtype(config.model.dtype, own, device, build.cpu_flags(), build.kernels_here()),
    )
    trunks = {one.name: (one.model, replace(held, stored=kept(one.quantised))) for one in parts.trunks}
    local = config.transport == "local"
    plan = make_plan(model, dtype, placed, held, config.engine.kv_cache_dtype, draft, trunks, one_process=local)
    shared = None
    if trunks:
        by_itself = [
            make_plan(each, dtype, by_base, own).total_bytes for each, own in ((model, held), *trunks.values())
        ]
        of_trunks = sum(actor.weight_bytes for actor in plan.actors if actor.name in trunks)
        shared = SharedExperts(plan.total_bytes, by_itself[0], of_trunks, sum(by_itself))
    return Planned(config.served_name, directory, model, plan, found.bytes_to_read, held, per_actor, shared)


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
    config: Config,
    dtype: str,
    num_experts: int,
    quantised: Mapping[Weight, StoredWeight] | None = None,
    num_models: int = 1,
) -> WeightsHeld:
    """What the configuration says the weights are held as; those that come `quantised` keep their own bits.

    `num_models`: of those whose experts are numbered together (`experts/sharing.py`).
    """
    experts = {
        number: HeldAs(dtype, config.experts.quantize_of(number % num_experts))
        for number in range(num_models * num_experts)
    }
    spares = tuple(HeldAs(dtype, spare.quantize) for spare in config.experts.spares)
    offloaded = {number: config.experts.offload_bytes_of(number) for number in range(num_experts)}
    return WeightsHeld(HeldAs(dtype, config.trunk.quantize), experts, quantised or {}, offloaded, spares)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a checkpoint holds of the actors."""

    bytes_to_read: dict[str, int]
    quantised: dict[Weight, StoredWeight]


def _checked(checkpoint: Checkpoint, model: ModelConfig, placed: Sequence[Holding], parts: VariantParts) -> _Found:
    """Look every tensor up; those of variants are in `parts`. Raises `CheckpointError` naming file and tensor."""
    found = _Found({}, {})
    actors = {"Trunk": tuple(weights_of_trunk(model)), **{one.name: weights_of_keys(model, one.keys) for one in placed}}
    for name, weights in actors.items():
        stored = {weight: checkpoint.find(weight) for weight in weights}
        found.bytes_to_read[name] = sum(each.nbytes for each in stored.values())
        found.quantised.update({weight: each for weight, each in stored.items() if each.grouping is not None})
    for one in placed:
        found.bytes_to_read[one.name] += parts.bytes_to_read(model, one.variant_keys)
    found.quantised.update(parts.quantised)
    found.bytes_to_read.update({trunk.name: trunk.bytes_to_read for trunk in parts.trunks})
    return found


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
